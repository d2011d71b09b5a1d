//! Shadows: policies that are asked beside the one that a group is balanced by, and the league of all of them.

use axum::Json;
use axum::extract::State;
use policy_host::Kind;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::ask::{JsonOf, PathOf, QueryOf, reason, register_of};
use super::error::{ApiError, Problem};
use super::gate::Caller;
use crate::policies::{AskError, validate};
use crate::registry::policy;
use crate::shadowing::Shadows;
use crate::state::{Shared, State as Whole};
use crate::store::scores::Sum;

/// Who is asked beside the policy that a group is balanced by, and what all of them would have been worth.
#[derive(Serialize, ToSchema)]
pub(super) struct ShadowsView {
    #[serde(flatten)]
    shadows: Shadows,
    /// Those first that would have gained most on what was in force.
    league: Vec<LeagueRow>,
}

/// What the plans of a policy would have been worth, each in the window after those that it was made of.
#[derive(Serialize, ToSchema)]
struct LeagueRow {
    /// As it is asked for.
    policy: String,
    /// JSON.
    settings: String,
    /// JSON.
    budget: String,
    /// Of the version that answered.
    digest: String,
    /// Windows with a score.
    windows: u64,
    /// Windows for which it had no plan.
    failed: u64,
    /// Rows of the busiest rank beside the mean, over layers and windows; null without any.
    max_over_mean: Option<f64>,
    /// The same of what was in force, in the same windows.
    in_force: Option<f64>,
    /// Of the worst layer in the worst window.
    worst: Option<f64>,
    /// Experts that come to ranks by a plan, mean.
    moved: f64,
    /// Units of fuel of a plan, mean.
    fuel: f64,
    /// Microseconds of a plan, mean.
    elapsed_us: f64,
    /// Why there was no plan, last.
    problem: Option<String>,
}

impl From<Sum> for LeagueRow {
    fn from(sum: Sum) -> Self {
        let Sum { policy, settings, budget, digest, max_over_mean, in_force, worst, .. } = sum;
        let Sum { windows, failed, moved, fuel, elapsed_us, problem, .. } = sum;
        let (windows, failed) = (windows.unsigned_abs(), failed.unsigned_abs());
        Self {
            policy,
            settings,
            budget,
            digest,
            windows,
            failed,
            max_over_mean,
            in_force,
            worst,
            moved,
            fuel,
            elapsed_us,
            problem,
        }
    }
}

/// Which windows.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Since {
    /// Only those that ended later, in milliseconds since 1970.
    #[serde(default)]
    after_ms: u64,
}

/// Who is to be asked.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewShadows {
    shadows: Shadows,
    /// Kept in the audit log; not empty.
    reason: String,
}

/// Policies that are asked in the shadow of the one that a group is balanced by, whenever a window has settled, and the league of
/// all of them: each plan scored by the window that came next. Nothing of it is carried out.
#[utoipa::path(get, path = "/api/v1/groups/{group}/shadows",
    params(("group" = String, Path), Since),
    responses((status = 200, body = ShadowsView), (status = 404, body = Problem)))]
pub(super) async fn shadows(
    State(state): State<Shared>,
    PathOf(group): PathOf<String>,
    QueryOf(since): QueryOf<Since>,
) -> Result<Json<ShadowsView>, ApiError> {
    register_of(&state.fleet(), &group)?;
    let shadows = state.store.setting(&group).await?;
    Ok(Json(view(&state, &group, shadows, since.after_ms).await?))
}

/// Changes which policies are asked in the shadow. Each must be there, decide placements, and accept its settings.
#[utoipa::path(put, path = "/api/v1/groups/{group}/shadows", params(("group" = String, Path)),
    request_body = NewShadows, security(("token" = ["operator"])),
    responses((status = 200, body = ShadowsView), (status = 400, body = Problem),
        (status = 404, body = Problem), (status = 422, body = Problem)))]
pub(super) async fn set_shadows(
    State(state): State<Shared>,
    caller: Caller,
    PathOf(group): PathOf<String>,
    JsonOf(new): JsonOf<NewShadows>,
) -> Result<Json<ShadowsView>, ApiError> {
    register_of(&state.fleet(), &group)?;
    let NewShadows { shadows, reason: why } = new;
    let entry = caller.entry("shadows.set", reason(&why)?);
    shadows.check()?;
    for entrant in &shadows.policies {
        let component = policy(&state, &entrant.policy).await?;
        let name = entrant.policy.clone();
        if component.kind() != Kind::Placement {
            let expected = "a placement policy".to_owned();
            return Err(ApiError::Value { name: "policy", value: name, expected });
        }
        let accepted = validate(&component, entrant.settings_text()).await;
        accepted.map_err(|verdict| AskError::Verdict { name, verdict })?;
    }
    state.store.set(&group, &shadows, entry).await?;
    Ok(Json(view(&state, &group, shadows, 0).await?))
}

async fn view(
    state: &Whole,
    group: &str,
    shadows: Shadows,
    after_ms: u64,
) -> Result<ShadowsView, ApiError> {
    let league = state.store.league(group, after_ms).await?;
    Ok(ShadowsView { shadows, league: league.into_iter().map(LeagueRow::from).collect() })
}
