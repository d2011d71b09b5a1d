//! The CPU device: bits that do not depend on batch, tactic or threads, and calls that are refused.
//! That the numbers are right is shown by the golden cases, in the crate `tests`.

mod flip;

use std::fs;
use std::ops::Range;
use std::path::Path;

use safetensors::SafeTensors;

use half::bf16;

use super::*;
use crate::device::CallOffsets;
use crate::memory::SharedMemory;
use crate::problem::{ActFormat, Form, WeightsIn};

/// Sixteen experts, four for each of 300 tokens, skewed: experts with many tokens and with none.
const SKEWED: &str = "skewed_e16_k4_h256_i64_t300";
/// Rows with places, and rows as a whole, that have no expert.
const HOLES: &str = "holes_e8_k4_h128_i64";

/// A golden layer and its inputs.
struct Rig {
    device: CpuDevice,
    hidden: usize,
    top_k: usize,
    x: Vec<bf16>,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

impl Rig {
    fn new(case: &str, options: CpuOptions) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/moe-golden").join(case);
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let bytes = fs::read(dir.join("io.safetensors")).unwrap();
        let io = SafeTensors::deserialize(&bytes).unwrap();
        let (x, ids) = (io.tensor("hidden_states").unwrap(), io.tensor("topk_ids").unwrap());
        let weights = io.tensor("topk_weights").unwrap();
        let words = |view: &safetensors::tensor::TensorView<'_>| -> Vec<[u8; 4]> {
            view.data().as_chunks().0.to_vec()
        };
        Self {
            device: CpuDevice::alone(options, &checkpoint, 512).unwrap(),
            hidden: x.shape()[1],
            top_k: ids.shape()[1],
            x: x.data().as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b)).collect(),
            ids: words(&ids).into_iter().map(i32::from_le_bytes).collect(),
            weights: words(&weights).into_iter().map(f32::from_le_bytes).collect(),
        }
    }

    fn tokens(&self) -> usize {
        self.ids.len() / self.top_k
    }

    /// Calls some of the tokens.
    fn call(&mut self, form: Form, rows: Range<usize>) -> Result<Vec<u16>, CallError> {
        let x = &self.x[rows.start * self.hidden..rows.end * self.hidden];
        let places = rows.start * self.top_k..rows.end * self.top_k;
        let (row_bytes, place_bytes) = (x.len() as u64 * 2, places.len() as u64 * 4);
        let offsets = CallOffsets {
            hidden: 0,
            topk_ids: row_bytes,
            topk_weights: row_bytes + place_bytes,
            output: row_bytes + 2 * place_bytes,
        };
        let buffer = SharedMemory::create("call", offsets.output + row_bytes).unwrap();
        buffer.write(offsets.hidden, x);
        buffer.write(offsets.topk_ids, &self.ids[places.clone()]);
        buffer.write(offsets.topk_weights, &self.weights[places]);
        let mut output = vec![bf16::NAN; x.len()];
        buffer.write(offsets.output, &output);
        let (tokens, top_k) = (rows.len() as u32, self.top_k as u32);
        self.device.run(&LayerCall { layer: 0, tokens, top_k, form, buffer: &buffer, offsets })?;
        buffer.read(offsets.output, &mut output);
        Ok(output.into_iter().map(bf16::to_bits).collect())
    }

    fn all(&mut self, form: Form) -> Vec<u16> {
        self.call(form, 0..self.tokens()).unwrap()
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let mut rig = Rig::new(SKEWED, CpuOptions::default());
    for form in Form::ALL {
        let whole = rig.all(form);
        for rows in [0..1, 299..300, 1..8, 8..72, 0..299, 150..300] {
            let part = rig.call(form, rows.clone()).unwrap();
            assert!(part == whole[rows.start * 256..rows.end * 256], "{form} {rows:?}");
        }
    }
}

#[test]
fn tactics_and_threads_change_no_bit() {
    let whole = Form::ALL.map(|form| Rig::new(SKEWED, CpuOptions::default()).all(form));
    let tactics = ["scalar-t4-p0", "scalar-t3-p64", "avx2-t2-p0", "avx2-t4-p128", "avx512-t12-p0"];
    for name in tactics.into_iter().chain(["avx512-t1-p0", "avx512-t5-p16", "avx512-t12-p256"]) {
        let tactic: CpuTactic = name.parse().unwrap();
        if !tactic.isa.available() {
            continue;
        }
        let options = CpuOptions { threads: 1 + name.len() % 3, tactic: Some(tactic), isa: None };
        let mut rig = Rig::new(SKEWED, options);
        for (form, whole) in Form::ALL.into_iter().zip(&whole) {
            assert!(rig.all(form) == *whole, "{name} {form}");
        }
    }
}

#[test]
fn places_without_an_expert_add_nothing_whatever_ran_before() {
    let mut rig = Rig::new(HOLES, CpuOptions::default());
    let ids = rig.ids.clone();
    for form in Form::ALL {
        let first = rig.all(form);
        // Every place of every buffer gets large numbers.
        rig.ids = (0..ids.len()).map(|place| (place % 4) as i32).collect();
        let weights = std::mem::replace(&mut rig.weights, vec![900.0; ids.len()]);
        assert!(rig.all(form) != first);
        rig.weights.clone_from(&weights);
        rig.ids.fill(-1);
        assert!(rig.all(form).iter().all(|&bits| bits == 0), "{form}: -1 everywhere is +0");
        // A weight that is no number counts only where there is an expert.
        rig.ids.clone_from(&ids);
        for (weight, _) in rig.weights.iter_mut().zip(&ids).filter(|(_, id)| **id == -1) {
            *weight = f32::NAN;
        }
        assert!(rig.all(form) == first, "{form}");
        rig.weights = weights;
    }
}

#[test]
fn no_tokens_are_an_ordinary_call() {
    let mut rig = Rig::new(SKEWED, CpuOptions::default());
    for form in Form::ALL {
        assert_eq!(rig.call(form, 7..7), Ok(Vec::new()));
    }
}

#[test]
fn a_bad_call_is_refused_and_the_next_one_served() {
    let mut rig = Rig::new(HOLES, CpuOptions::default());
    let form = Form { act: ActFormat::Bf16, weights_in: WeightsIn::Combine };
    let whole = rig.all(form);
    let (ids, weights) = (rig.ids.clone(), rig.weights.clone());
    let live = ids.iter().position(|&id| id >= 0).unwrap();
    let (token, place) = ((live / 4) as u32, (live % 4) as u32);
    for id in [8, -2, i32::MAX, i32::MIN] {
        rig.ids[live] = id;
        let refused = rig.call(form, 0..rig.tokens()).unwrap_err();
        assert_eq!(refused, CallError::ExpertId { token, place, id, last: 7 });
    }
    rig.ids.clone_from(&ids);
    rig.ids[8..12].copy_from_slice(&[-1, 3, 5, 3]);
    let refused = rig.call(form, 0..rig.tokens()).unwrap_err();
    assert_eq!(refused, CallError::DuplicateExpert { token: 2, id: 3, first: 1, second: 3 });
    rig.ids.clone_from(&ids);
    for weight in [f32::NAN, f32::INFINITY] {
        rig.weights[live] = weight;
        let message = rig.call(form, 0..rig.tokens()).unwrap_err().to_string();
        let named = format!("token {token} at place {place} is {weight}");
        assert!(message.contains(&named), "{message}");
    }
    rig.weights = weights;
    assert!(rig.all(form) == whole);

    let buffer = SharedMemory::create("call", 64).unwrap();
    let offsets = CallOffsets { hidden: 0, topk_ids: 0, topk_weights: 0, output: 0 };
    let call = LayerCall { layer: 0, tokens: 0, top_k: 4, form, buffer: &buffer, offsets };
    for top_k in [0, 17] {
        let refused = rig.device.run(&LayerCall { top_k, ..call });
        assert_eq!(refused, Err(CallError::TopK { top_k }));
    }
    let refused = rig.device.run(&LayerCall { layer: 3, ..call });
    assert_eq!(refused, Err(CallError::Layer { layer: 3, served: vec![0] }));
}

#[test]
fn a_layer_without_scales_of_inputs_serves_bf16_alone() {
    let mut rig = Rig::new(HOLES, CpuOptions::default());
    rig.device.layers[0].scaled = false;
    let nvfp4 = Form { act: ActFormat::Nvfp4, ..Form::default() };
    assert_eq!(rig.call(nvfp4, 0..2), Err(CallError::NoInputScale { layer: 0 }));
    assert!(rig.call(Form::default(), 0..2).is_ok());
}

#[test]
fn a_tactic_that_cannot_run_is_refused_by_name() {
    let tactic = Some("scalar-t4-p512".parse().unwrap());
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/moe-golden").join(HOLES);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let options = CpuOptions { tactic, ..CpuOptions::default() };
    let refused = CpuDevice::alone(options, &checkpoint, 512).unwrap_err();
    assert_eq!(refused.to_string(), "tactic scalar-t4-p512 cannot run");
}

/// What was measured is used, and changes no bit.
#[test]
fn calls_get_the_tactics_of_their_buckets() {
    let mut rig = Rig::new(SKEWED, CpuOptions { threads: 2, ..CpuOptions::default() });
    let form = Form::default();
    let whole = rig.all(form);
    let names = rig.device.tactics();
    assert_eq!(names[0], BY_TOKENS);
    let problem = rig.device.problem(0, form.act).unwrap();
    let choice = |tokens, tactic: &str| Choice { problem, tokens, tactic: tactic.to_owned() };
    for name in &names[1..] {
        rig.device.choose(&[choice(1, BY_TOKENS), choice(1_000, name)]).unwrap();
        let chosen = &rig.device.chosen[0][0];
        assert_eq!(chosen.get(1), None);
        assert_eq!(chosen.get(2).map(|tactic| tactic.to_string()).as_ref(), Some(name));
        assert!(rig.all(form) == whole, "{name}");
    }
    let before = rig.device.chosen.clone();
    for wrong in ["fast", "scalar-t4-p4096"] {
        let error = rig.device.choose(&[choice(1, wrong)]).unwrap_err();
        assert_eq!((&error.name[..], &error.known), (wrong, &names));
        assert_eq!(rig.device.chosen, before, "everything stays as it was");
    }
    rig.device.choose(&[]).unwrap();
    assert_eq!(rig.device.chosen[0][0].get(2), None);
    // With other threads times are others.
    let other = Rig::new(SKEWED, CpuOptions { threads: 3, ..CpuOptions::default() });
    let stale = rig.device.provenance().holds(&other.device.provenance()).unwrap_err();
    assert!(stale.to_string().contains("2 threads"), "{stale}");
}
