//! A tactics policy to start from: for each bucket the tactic with the least measured median at that size. The contract, and
//! every rule of it, is in `wit`.

wit_bindgen::generate!({ path: "wit", world: "tactics", generate_all });

use exports::moeplane::policy::chooser::{self, Choice, Request, Table};
use exports::moeplane::policy::meta::{self, Info, Issue};
use moeplane::policy::types::Error;

struct MyPolicy;

export!(MyPolicy);

impl meta::Guest for MyPolicy {
    fn describe() -> Info {
        Info {
            name: "my-policy".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "The tactic with the least measured median of each bucket.".into(),
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

impl chooser::Guest for MyPolicy {
    fn decide(request: Request) -> Result<Table, Error> {
        let choices = request.buckets.iter().enumerate().map(|(bucket, tokens)| {
            let of_size = request.measurements.iter().filter(|m| m.tokens == *tokens);
            match of_size.min_by(|a, b| a.median_us.total_cmp(&b.median_us)) {
                Some(best) => {
                    Choice { candidate: best.candidate, expected_us: Some(best.median_us) }
                }
                // Nothing is known: what is in force stays, and the device's first choice begins.
                None => Choice {
                    candidate: request.previous.get(bucket).copied().unwrap_or(0),
                    expected_us: None,
                },
            }
        });
        let choices: Vec<Choice> = choices.collect();
        let measured = choices.iter().filter(|choice| choice.expected_us.is_some()).count();
        let explanation = format!("{measured} of {} buckets were measured", choices.len());
        Ok(Table { choices, explanation })
    }
}
