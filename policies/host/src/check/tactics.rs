//! The rules of a table of tactics: one legal choice for each bucket.

use super::{Fault, below, length, not_negative, text};
use crate::contract::chooser::{Request, Table};

/// Checks a table against the request that it answers.
///
/// # Errors
/// The first rule that it breaks.
pub fn tactics(request: &Request, table: &Table) -> Result<(), Fault> {
    text("the explanation", &table.explanation)?;
    length("the list of choices", table.choices.len(), request.buckets.len())?;
    for choice in &table.choices {
        below("the candidate of a choice", choice.candidate, request.candidates.len())?;
        if let Some(expected) = choice.expected_us {
            not_negative("expected-us of a choice", expected)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::chooser::Choice;
    use crate::example;

    #[test]
    fn one_legal_choice_for_each_bucket() {
        let check = |alter: fn(&mut Vec<Choice>)| {
            let choice = |candidate, expected_us| Choice { candidate, expected_us };
            let mut choices = vec![choice(0, Some(1.0)), choice(1, None), choice(2, None)];
            alter(&mut choices);
            let table = Table { choices, explanation: "by the table".to_owned() };
            tactics(&example::tactics("{}"), &table).map_err(|fault| fault.to_string())
        };
        assert_eq!(check(|_| {}), Ok(()));
        let refused = check(|choices| choices.truncate(2)).unwrap_err();
        assert_eq!(refused, "the list of choices has 2 entries, expected 3");
        let refused = check(|choices| choices[2].candidate = 3).unwrap_err();
        assert_eq!(refused, "the candidate of a choice is 3, expected less than 3");
        let refused = check(|choices| choices[0].expected_us = Some(f32::NAN)).unwrap_err();
        assert!(refused.starts_with("expected-us of a choice is NaN"), "{refused}");
    }
}
