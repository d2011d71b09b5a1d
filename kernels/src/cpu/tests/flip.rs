//! Another placement takes the place of one while a group calls.

use std::sync::Barrier;
use std::thread;

use super::*;
use crate::group::{GroupError, Reason};
use crate::heap::shm::{Membership, ShmHeap};
use crate::route::RouteTable;

const RANKS: u32 = 3;
const EXPERTS: u32 = 16;
const SLOTS: usize = 6;

/// Experts in order from `first` on, in six slots on each of three ranks: two have two replicas.
fn placement(first: u32) -> Vec<u32> {
    (0..SLOTS as u32 * RANKS).map(|slot| (slot + first) % EXPERTS).collect()
}

/// What a rank holds of a placement; replicas share tokens evenly.
fn slots_of(rank: u32, epoch: u64, placement: &[u32]) -> LayerSlots {
    let mut route =
        RouteTable { replica_start: vec![0], slots: Vec::new(), cumulative: Vec::new() };
    for expert in 0..EXPERTS {
        let replicas: Vec<u32> = (0..)
            .zip(placement)
            .filter(|(_, held)| **held == expert)
            .map(|(slot, _)| slot)
            .collect();
        let count = replicas.len() as u32;
        let shares = (1..=count).map(|n| (u32::from(u16::MAX) * n / count) as u16);
        route.cumulative.extend(shares);
        route.slots.extend(replicas);
        route.replica_start.push(route.slots.len() as u32);
    }
    let experts = placement[rank as usize * SLOTS..][..SLOTS].iter().copied().map(Some).collect();
    LayerSlots { epoch, experts, route }
}

fn checkpoint() -> Checkpoint {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/moe-golden").join(SKEWED);
    Checkpoint::open(&dir).unwrap()
}

/// A rank of a group that holds experts in order under epoch 1.
fn rank(folder: &Path, rank: u32) -> Rig {
    let checkpoint = checkpoint();
    let mut slots = CpuSlots::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap();
    slots.load(&checkpoint, 0, slots_of(rank, 1, &placement(0))).unwrap();
    let shape = HeapShape::of_group(RANKS, 512, checkpoint.layers());
    let membership = Membership { folder: folder.to_owned(), name: "g".to_owned(), rank };
    let heap = ShmHeap::join(&membership, shape, &Vec::new()).unwrap();
    let group = Group::new(Arc::new(heap), Duration::from_secs(60));
    Rig { device: CpuDevice::new(slots, group), ..Rig::new(SKEWED, CpuOptions::default()) }
}

/// All ranks of a group, which have all joined.
fn group(folder: &Path) -> Vec<Rig> {
    (0..RANKS).map(|number| rank(folder, number)).collect()
}

impl Rig {
    /// Stages a placement to its end and has it at hand.
    fn stage(&mut self, epoch: u64, first: u32) {
        let wanted = slots_of(self.device.group.rank(), epoch, &placement(first));
        let mut stager = self.device.stager(0, wanted).unwrap();
        while stager.step(&checkpoint()).unwrap().is_some() {}
        self.device.take_staged(stager.staged().unwrap()).unwrap();
    }

    /// This rank's part of call `number`: its rows, or none if it has no engine.
    fn part(&mut self, form: Form) -> Result<Vec<u16>, CallError> {
        match self.device.group.rank() {
            2 => {
                while !self.device.group.is_pending() {
                    thread::yield_now();
                }
                self.device.join(None).map(|()| Vec::new())
            }
            rank => self.call(form, rows(rank)),
        }
    }
}

fn rows(rank: u32) -> Range<usize> {
    [0..120, 120..300, 0..0][rank as usize].clone()
}

/// What a device that is alone answers to a rank's rows.
fn expected(form: Form) -> Vec<Vec<u16>> {
    let whole = Rig::new(SKEWED, CpuOptions::default()).all(form);
    (0..RANKS).map(|rank| whole[rows(rank).start * 256..rows(rank).end * 256].to_vec()).collect()
}

const CALLS: u64 = 40;

/// A rank's calls, in which every expert goes to another rank; its epoch after each. The last rank to be ready, at call 30,
/// is the one without an engine.
fn run(mut rig: Rig, (epoch, form): (u64, Form), expected: &[Vec<u16>]) -> Vec<u64> {
    let rank = rig.device.group.rank();
    let mut epochs = Vec::new();
    for call in 0..CALLS {
        if call == 10 * u64::from(rank + 1) {
            rig.stage(epoch, 6);
            rig.device.make_ready(0, epoch).unwrap();
        }
        let output = rig.part(form).unwrap();
        assert!(output == expected[rank as usize], "{form}, rank {rank}, call {call}");
        epochs.push(rig.device.epoch(0).unwrap());
    }
    // Nothing of the placement before is left.
    let slot = crate::cpu::slot_bytes(&checkpoint().layers()[0].shape);
    assert_eq!(rig.device.resident_bytes(), SLOTS as u64 * slot);
    epochs
}

#[test]
fn all_ranks_flip_after_the_same_call_and_no_bit_changes() {
    let folder = tempfile::tempdir().unwrap();
    for (epoch, form) in (2..).zip(Form::ALL) {
        let expected = &expected(form);
        let ranks = group(folder.path());
        let epochs: Vec<Vec<u64>> = thread::scope(|scope| {
            let running: Vec<_> = ranks
                .into_iter()
                .map(|rig| scope.spawn(move || run(rig, (epoch, form), expected)))
                .collect();
            running.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let flipped = epochs[0].iter().position(|&found| found == epoch).unwrap();
        assert_eq!(flipped, 30, "all are ready with call 30");
        assert_eq!(epochs, vec![epochs[0].clone(); RANKS as usize]);
        assert_eq!(epochs[0][CALLS as usize - 1], epoch);
    }
}

#[test]
fn nothing_flips_while_one_rank_is_not_ready_and_what_is_staged_can_be_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let (form, barrier) = (Form::default(), &Barrier::new(RANKS as usize));
    let expected = &expected(form);
    let calls = |rig: &mut Rig| {
        for _ in 0..5 {
            assert!(rig.part(form).unwrap() == expected[rig.device.group.rank() as usize]);
        }
        assert_eq!(rig.device.epoch(0), Some(1));
        barrier.wait();
    };
    thread::scope(|scope| {
        for mut rig in group(folder.path()) {
            scope.spawn(move || {
                rig.stage(2, 6);
                let stays = rig.device.group.rank() == 1;
                if !stays {
                    rig.device.make_ready(0, 2).unwrap();
                }
                calls(&mut rig);
                // Rank 1 goes back: it stages another, which nobody else is ready for.
                if stays {
                    rig.device.drop_staged(0).unwrap();
                    rig.stage(3, 12);
                    rig.device.make_ready(0, 3).unwrap();
                }
                calls(&mut rig);
            });
        }
    });
}

/// A rank that did not see that all were ready, because the call was given up, has the others' placement after the next.
#[test]
fn a_rank_that_is_a_placement_behind_catches_up() {
    let folder = tempfile::tempdir().unwrap();
    let form = Form::default();
    let expected = &expected(form);
    thread::scope(|scope| {
        for mut rig in group(folder.path()) {
            scope.spawn(move || {
                let rank = rig.device.group.rank();
                rig.stage(2, 6);
                rig.device.make_ready(0, 2).unwrap();
                if rank != 1 {
                    rig.device.layers[0].flip();
                }
                let Err(CallError::Group(error)) = rig.part(form) else { panic!("it cannot be") };
                let GroupError { rank: late, layer, reason, .. } = error;
                assert_eq!((late, layer, reason), (1, 0, Reason::Behind));
                assert_eq!(
                    error.to_string(),
                    "rank 1 was a placement behind at layer 0, and is not any more: repeat the step"
                );
                for _ in 0..3 {
                    assert!(rig.part(form).unwrap() == expected[rank as usize]);
                    assert_eq!(rig.device.epoch(0), Some(2));
                }
            });
        }
    });
}

#[test]
fn what_cannot_be_staged_is_said_and_memory_is_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut rig = rank(folder.path(), 0);
    let slot = crate::cpu::slot_bytes(&checkpoint().layers()[0].shape);
    let (device, wanted) = (&mut rig.device, |epoch, first| slots_of(0, epoch, &placement(first)));
    assert_eq!(device.resident_bytes(), 6 * slot);
    let said = |error: StageError| error.to_string();
    assert_eq!(said(device.stager(7, wanted(2, 0)).unwrap_err()), "layer 7 is not served");
    let early = said(device.stager(0, wanted(1, 0)).unwrap_err());
    assert_eq!(early, "epoch 1 of layer 0 is not after 1, which is in force");
    let few = LayerSlots { experts: vec![None; 5], ..wanted(2, 0) };
    let few = said(device.stager(0, few).unwrap_err());
    assert_eq!(few, "layer 0 would have 5 slots, expected 6");
    assert_eq!(said(device.make_ready(0, 2).unwrap_err()), "epoch 2 of layer 0 is not staged");

    // Slots 2 to 7 of the experts: four are held already, and are taken along.
    let mut stager = device.stager(0, wanted(2, 2)).unwrap();
    assert_eq!(stager.left(), 2);
    assert_eq!(stager.step(&checkpoint()).unwrap(), Some(slot));
    assert!(stager.staged().is_none());
    assert_eq!(stager.step(&checkpoint()).unwrap(), Some(slot));
    assert_eq!(stager.step(&checkpoint()).unwrap(), None);
    // What an expert is does not depend on when and where it was derived.
    let mut other = device.stager(0, wanted(2, 10)).unwrap();
    while other.step(&checkpoint()).unwrap().is_some() {}
    let [digests, others] = [stager.digests(), other.digests()];
    assert_eq!((digests.len(), others.len()), (8, 12));
    assert_eq!(digests[..6], others[..6]);
    assert!(digests.windows(2).all(|pair| pair[0].1 != pair[1].1));
    // Nor does what it answers, by whatever instructions.
    let portable = CpuOptions { threads: 1, isa: Some(Isa::Scalar), tactic: None };
    let mut plain = CpuSlots::new(portable).unwrap();
    plain.load(&checkpoint(), 0, slots_of(0, 1, &placement(2))).unwrap();
    let heap = ShmHeap::alone(HeapShape { ranks: 1, max_tokens: 1, max_pairs: 1, hidden: 32 });
    let plain = CpuDevice::new(plain, Group::new(Arc::new(heap.unwrap()), Duration::MAX));
    let plain = plain.stager(0, wanted(2, 2)).unwrap().canaries().unwrap();
    let [canaries, others] = [stager.canaries().unwrap(), other.canaries().unwrap()];
    assert_eq!((canaries.len(), others.len(), plain.len()), (8, 12, 6));
    assert_eq!((&canaries[..6], &canaries[2..]), (&others[..6], &plain[..]));
    assert!(canaries.windows(2).all(|pair| pair[0].1 != pair[1].1));
    device.take_staged(stager.staged().unwrap()).unwrap();
    assert_eq!(device.resident_bytes(), 8 * slot);
    device.drop_staged(0).unwrap();
    assert_eq!(device.resident_bytes(), 6 * slot);

    rig.stage(2, 2);
    rig.device.make_ready(0, 2).unwrap();
    let device = &mut rig.device;
    let ready = "epoch 2 of layer 0 is ready, and cannot be taken back";
    assert_eq!(said(device.drop_staged(0).unwrap_err()), ready);
    let stager = device.stager(0, wanted(3, 0)).unwrap();
    assert_eq!(said(device.take_staged(stager.staged().unwrap()).unwrap_err()), ready);
    device.layers[0].flip();
    assert_eq!((device.epoch(0), device.resident_bytes()), (Some(2), 8 * slot));
}
