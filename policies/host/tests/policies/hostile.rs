//! Components that mean harm: each becomes a verdict that names the limit, and the host stays as it was.

use std::fs;
use std::time::Duration;

use policy_host::check::Fault;
use policy_host::contract::EMPTY;
use policy_host::limits::CompileLimits;
use policy_host::{Component, Host, Verdict, example};
use tempfile::TempDir;

use crate::make::{Guest, SPARE, WORDS, compile_bomb};
use crate::{host, load_patiently};

/// A host with a deadline that no busy machine reaches, and its own store.
fn patient() -> (Host, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    (host(folder.path(), Some(Duration::from_secs(600))), folder)
}

fn load(guest: &Guest) -> Result<Component, Verdict> {
    load_patiently(&guest.build())
}

fn verdict(guest: &Guest) -> Verdict {
    load(guest).unwrap_err()
}

const ENDLESS: &str = "(loop (br 0)) unreachable";
const BOMB: &str = "(if (i32.eq (memory.grow (i32.const 60000)) (i32.const -1)) (then unreachable)) i32.const 2048";

#[test]
fn a_harmless_component_answers_twice_the_same() {
    let policy = load(&Guest::placement()).unwrap();
    assert_eq!(policy.info().name, "hostile");
    policy.validate("{}").unwrap();
    let ask = || policy.decide(&example::placement("{}")).unwrap();
    let (first, second) = (ask(), ask());
    assert!(first.fuel > 0);
    assert_eq!((first.value, first.fuel), (second.value, second.fuel));
    let asked = policy.decide(&example::tactics("{}")).unwrap_err();
    assert_eq!(asked.to_string(), "this is a placement policy, expected a tactics policy");
}

fn assert_deadline(guest: &Guest, expected_ms: u64) {
    let folder = tempfile::tempdir().unwrap();
    let verdict = host(folder.path(), None).load(&guest.build()).unwrap_err();
    let Verdict::Deadline { limit_ms, used_ms } = verdict else { panic!("{verdict}") };
    assert_eq!(limit_ms, expected_ms);
    assert!(used_ms >= limit_ms, "{verdict}");
}

#[test]
fn an_endless_loop_meets_its_deadline() {
    assert_deadline(&Guest::tactics(ENDLESS), 50);
}

#[test]
fn an_endless_start_function_meets_its_deadline() {
    let more = "(func $start (loop (br 0))) (start $start)".to_owned();
    assert_deadline(&Guest { more, ..Guest::placement() }, 500);
}

#[test]
fn where_no_deadline_ends_a_loop_fuel_does() {
    assert_eq!(verdict(&Guest::tactics(ENDLESS)), Verdict::Fuel { limit: 2_000_000_000 });
}

#[test]
fn a_memory_bomb_is_refused_its_memory() {
    let asked = (60_000 + 4) << 16;
    assert_eq!(verdict(&Guest::tactics(BOMB)), Verdict::Memory { limit: 64 << 20, asked });
}

#[test]
fn a_compile_bomb_is_stopped() {
    let bomb = compile_bomb().build();
    let limits = CompileLimits { seconds: 1, memory_bytes: 4 << 30 };
    let (host, _folder) = patient();
    let stopped = host.load_within(&bomb, limits).unwrap_err();
    assert!(matches!(stopped, Verdict::CompileTime { .. }), "{stopped}");
}

#[test]
fn a_compiler_without_memory_is_a_verdict() {
    let limits = CompileLimits { seconds: 20, memory_bytes: 64 << 20 };
    let (host, _folder) = patient();
    let starved = host.load_within(&compile_bomb().build(), limits).unwrap_err();
    let expected = matches!(starved, Verdict::CompilerDied { .. } | Verdict::Compile { .. });
    assert!(expected, "{starved}");
}

#[test]
fn a_changed_or_foreign_compiled_file_is_made_again_and_never_run() {
    let (host, _folder) = patient();
    let bytes = Guest::placement().build();
    let path = host.store().path(host.load(&bytes).unwrap().digest());
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0xff);
    fs::write(&path, &bad).unwrap();
    // Somebody who has the file open keeps what it was.
    let opened = fs::File::open(&path).unwrap();
    host.load(&bytes).unwrap();
    assert_eq!(fs::read(&path).unwrap(), good);
    assert_eq!(std::io::read_to_string(opened).ok(), String::from_utf8(bad).ok());
    // Code of another component, kept by the same host, under this one's name.
    let other = Guest::tactics("unreachable").build();
    host.load(&other).unwrap_err();
    let foreign = host.store().path(&policy_host::store::digest(&other));
    fs::copy(foreign, &path).unwrap();
    host.load(&bytes).unwrap();
    assert_eq!(fs::read(&path).unwrap(), good);
    // Code that another installation made, with its own key.
    let (elsewhere, _their_folder) = patient();
    elsewhere.load(&bytes).unwrap();
    let theirs = elsewhere.store().path(&policy_host::store::digest(&bytes));
    fs::copy(theirs, &path).unwrap();
    host.load(&bytes).unwrap();
    assert_eq!(fs::read(&path).unwrap(), good);
}

#[test]
fn a_stack_bomb_is_a_verdict() {
    let more =
        "(func $deep (param i32) (result i32) (i32.add (call $deep (local.get 0)) (i32.const 1)))";
    let mut guest = Guest::tactics("(call $deep (i32.const 0))");
    guest.more = more.to_owned();
    assert_eq!(verdict(&guest), Verdict::Stack { limit: 512 << 10 });
}

#[test]
fn a_huge_answer_is_not_copied() {
    // 32 MiB of zeros as the explanation.
    let mut guest = Guest::placement();
    guest.decide = "(drop (memory.grow (i32.const 600))) i32.const 2048".to_owned();
    guest.answer = vec![0, SPARE, 0, 65536, 32 << 20];
    assert_eq!(verdict(&guest), Verdict::OutputTooLarge { limit: 8 << 20 });
    // A list beyond the memory.
    guest.answer = vec![0, SPARE, 1 << 30, WORDS[0], WORDS[1]];
    let beyond = verdict(&guest);
    assert!(
        matches!(beyond, Verdict::BadOutput { .. } | Verdict::OutputTooLarge { .. }),
        "{beyond}"
    );
}

#[test]
fn an_answer_outside_the_memory_or_of_no_known_form_is_a_verdict() {
    let mut guest = Guest::placement();
    guest.decide = "i32.const -8".to_owned();
    assert!(matches!(verdict(&guest), Verdict::BadOutput { .. } | Verdict::Trap { .. }));
    let mut guest = Guest::placement();
    guest.answer[0] = 7;
    assert!(matches!(verdict(&guest), Verdict::BadOutput { .. }));
}

#[test]
fn a_trap_is_told_with_the_functions_that_led_to_it() {
    let more = "(func $inner unreachable) (func $outer (call $inner))".to_owned();
    let trap = verdict(&Guest { more, ..Guest::tactics("(call $outer) (i32.const 2048)") });
    let Verdict::Trap { reason } = &trap else { panic!("{trap}") };
    assert!(reason.contains("`unreachable` instruction executed in inner < outer"), "{reason}");
}

/// Spins when the seed is not that of the example.
const SPINS_WHEN_ASKED: &str = "(if (i64.ne (i64.load offset=8 (local.get 0)) (i64.const 1)) (then (loop (br 0)))) i32.const 2048";

#[test]
fn those_that_spin_hold_nobody_up_until_as_many_run_as_may() {
    let folder = tempfile::tempdir().unwrap();
    let host = host(folder.path(), Some(Duration::from_secs(3)));
    let guest = Guest { decide: SPINS_WHEN_ASKED.to_owned(), ..Guest::placement() };
    let policy = host.load(&guest.build()).unwrap();
    let quick = example::placement("{}");
    let mut endless = example::placement("{}");
    endless.context.seed = 2;
    let busy = |verdict: &Verdict| *verdict == Verdict::Busy { limit: 8 };
    std::thread::scope(|scope| {
        // A quick call may hold the last place for a moment.
        let spin = || loop {
            let verdict = policy.decide(&endless).unwrap_err();
            if !busy(&verdict) {
                return verdict;
            }
        };
        let first = scope.spawn(spin);
        policy.decide(&quick).unwrap();
        let others: Vec<_> = (1..8).map(|_| scope.spawn(spin)).collect();
        let began = std::time::Instant::now();
        while policy.decide(&quick).map_or_else(|verdict| !busy(&verdict), |_| true) {
            assert!(began.elapsed() < Duration::from_secs(60), "never busy");
        }
        for spinning in others.into_iter().chain([first]) {
            let ended = spinning.join().unwrap();
            // Alone on a fast processor, one may use up its fuel before.
            let expected = matches!(ended, Verdict::Deadline { .. } | Verdict::Fuel { .. });
            assert!(expected, "{ended}");
        }
    });
    policy.decide(&quick).unwrap();
}

/// A plan of one change: a placement of layer 1, and its balance afterwards.
fn planning(placement: &[u32], after: f32) -> Guest {
    let mut guest = Guest::placement();
    let slots = SPARE + 40;
    let length = u32::try_from(placement.len()).unwrap();
    // layer; placement; moves; max-over-mean; milliseconds: none.
    guest.spare = vec![1, slots, length, SPARE, 0, 1.5_f32.to_bits(), after.to_bits(), 0, 0, 0];
    guest.spare.extend(placement);
    guest.answer = vec![0, SPARE, 1, WORDS[0], WORDS[1]];
    guest
}

const PLACEMENT: [u32; 12] = [0, 1, EMPTY, 2, 3, EMPTY, 4, 5, EMPTY, 6, 7, 0];

#[test]
fn a_plan_of_nan_is_refused() {
    load(&planning(&PLACEMENT, 1.0)).unwrap();
    let refused = verdict(&planning(&PLACEMENT, f32::NAN));
    assert!(matches!(refused, Verdict::Refused(Fault::Number { .. })), "{refused}");
}

#[test]
fn an_invalid_placement_is_refused() {
    let with = |slot: usize, expert: u32| {
        let mut placement = PLACEMENT;
        placement[slot] = expert;
        verdict(&planning(&placement, 1.0))
    };
    assert_eq!(with(1, EMPTY), Verdict::Refused(Fault::Lost { layer: 1, expert: 1 }));
    let double = Fault::Duplicate { layer: 1, rank: 0, expert: 0 };
    assert_eq!(with(2, 0), Verdict::Refused(double));
    assert!(matches!(with(1, 99), Verdict::Refused(Fault::Range { found: 99, .. })));
}

#[test]
fn another_version_is_named() {
    let mut guest = Guest::placement();
    guest.contract = ("moeplane:policy@0.1.0", "moeplane:policy@0.2.0");
    let refused = verdict(&guest);
    assert!(
        matches!(&refused, Verdict::Version { found, .. } if found.ends_with("@0.2.0")),
        "{refused}"
    );
}

#[test]
fn an_import_is_named() {
    let mut guest = Guest::placement();
    guest.contract = (
        "world placement {",
        "interface clock { now: func() -> u64; }\nworld placement { import clock;",
    );
    guest.more = r#"(import "moeplane:policy/clock@0.1.0" "now" (func (result i64)))"#.to_owned();
    let name = "moeplane:policy/clock@0.1.0".to_owned();
    assert_eq!(verdict(&guest), Verdict::Imports { name });
}

#[test]
fn garbage_and_giants_are_refused_unread() {
    let (host, _folder) = patient();
    let garbage: Vec<u8> =
        (0..10_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    assert!(matches!(host.load(&garbage), Err(Verdict::Malformed { .. })));
    let giant = vec![0; 200 << 20];
    assert!(matches!(host.load(&giant), Err(Verdict::TooLarge { .. })));
}

#[test]
fn a_name_that_is_none_is_refused() {
    for name in ["Hostile", "hos/ile"] {
        let refused = verdict(&Guest { name, ..Guest::placement() });
        assert_eq!(refused, Verdict::Refused(Fault::Name { name: name.to_owned() }));
    }
}

/// Kilobytes that this process keeps in memory.
fn resident_kb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Twice the pool's warm memories: what may stay is bounded by the pool, not by the number of calls.
const SLACK_KB: u64 = 32 << 10;

#[test]
fn memory_returns_after_hundreds_of_them() {
    assert_memory_returns(500);
}

/// `cargo xtask hostile-policies`
#[test]
#[ignore = "takes half a minute"]
fn memory_returns_after_ten_thousand_of_them() {
    assert_memory_returns(10_000);
}

fn assert_memory_returns(rounds: usize) {
    let (host, _folder) = patient();
    let mut deep = Guest::tactics("(call $deep (i32.const 0))");
    deep.more =
        "(func $deep (param i32) (result i32) (i32.add (call $deep (local.get 0)) (i32.const 1)))"
            .to_owned();
    let mut huge = Guest::placement();
    huge.decide = "(drop (memory.grow (i32.const 600))) i32.const 2048".to_owned();
    huge.answer = vec![0, SPARE, 0, 65536, 32 << 20];
    let components: Vec<Vec<u8>> = vec![
        Guest::tactics("unreachable").build(),
        Guest::tactics(BOMB).build(),
        deep.build(),
        huge.build(),
        planning(&PLACEMENT, f32::NAN).build(),
        planning(&[0; 12], 1.0).build(),
        vec![0xa5; 10_000],
    ];
    let round = |count: usize| {
        for component in components.iter().cycle().take(count) {
            let verdict = host.load(component).unwrap_err();
            assert!(verdict.is_fault(), "{verdict}");
        }
    };
    round(100);
    let before = resident_kb();
    round(rounds);
    let after = resident_kb();
    assert!(after <= before + SLACK_KB, "{before} kB before, {after} kB after");
}
