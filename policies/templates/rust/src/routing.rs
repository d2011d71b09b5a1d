//! A routing policy to start from: tokens of every rank go to the replicas of an expert in equal parts, but not to those on
//! ranks that drain, where another has one. The contract, and every rule of it, is in `wit`.

wit_bindgen::generate!({ path: "wit", world: "routing", generate_all });

use exports::moeplane::policy::meta::{self, Info, Issue};
use exports::moeplane::policy::splitter::{self, Request, Split, Splits};
use moeplane::policy::types::{Error, RankState};

struct MyPolicy;

export!(MyPolicy);

impl meta::Guest for MyPolicy {
    fn describe() -> Info {
        Info {
            name: "my-policy".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "Sends no tokens to ranks that drain.".into(),
            settings_schema: r#"{"type":"object","additionalProperties":false}"#.into(),
        }
    }

    fn validate(settings: String) -> Result<(), Vec<Issue>> {
        if settings.trim() == "{}" {
            return Ok(());
        }
        let message = format!("got {settings}, expected {{}}: there are no settings");
        Err(vec![Issue { path: String::new(), message }])
    }
}

impl splitter::Guest for MyPolicy {
    fn decide(request: Request) -> Result<Splits, Error> {
        let ranks = &request.topology.ranks;
        let per_rank = request.topology.slots_per_rank as usize;
        let stays = |slot: &usize| ranks[slot / per_rank].state == RankState::Active;
        let mut layers = Vec::new();
        for layer in &request.layers {
            // Replicas come in the order of experts, then of slots.
            let mut weights = Vec::new();
            for expert in 0..request.model.experts {
                let slots = (0..layer.placement.len()).filter(|slot| layer.placement[*slot] == expert);
                let any = slots.clone().any(|slot| stays(&slot));
                weights.extend(slots.map(|slot| u16::from(stays(&slot) || !any)));
            }
            if weights.contains(&0) {
                layers.push(Split { layer: layer.id, sources: 1, weights });
            }
        }
        let explanation = format!("{} layers have replicas on ranks that drain", layers.len());
        Ok(Splits { layers, explanation })
    }
}
