//! The first calls of a component, before anybody relies on it: the types of its functions are checked when it is
//! instantiated, so only a call shows that it works. The settings `{}` and an example, the same checks as later, and
//! twice, because equal requests must give equal answers.

use crate::component::Component;
use crate::example;
use crate::question::{Kind, Question};
use crate::verdict::Verdict;

const SETTINGS: &str = "{}";

pub(crate) fn run(component: &Component) -> Result<(), Verdict> {
    component.validate(SETTINGS)?;
    match component.kind() {
        Kind::Placement => twice(component, &example::placement(SETTINGS)),
        Kind::Routing => twice(component, &example::routing(SETTINGS)),
        Kind::Tactics => twice(component, &example::tactics(SETTINGS)),
    }
}

/// Declining is an answer too; it must only be the same one.
fn twice<Q: Question>(component: &Component, question: &Q) -> Result<(), Verdict> {
    let differs = |what: &str| Err(Verdict::NotDeterministic { what: what.to_owned() });
    match (component.decide(question), component.decide(question)) {
        (Ok(first), Ok(second)) if first.value != second.value => differs("answers"),
        (Ok(first), Ok(second)) if first.fuel != second.fuel => differs("fuel"),
        (Ok(_), Ok(_)) => Ok(()),
        (Err(Verdict::Declined { message }), Err(Verdict::Declined { message: again })) => {
            if message == again {
                Ok(())
            } else {
                differs("answers")
            }
        }
        (Err(verdict), _) | (_, Err(verdict)) => Err(verdict),
    }
}
