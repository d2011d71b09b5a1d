//! What the commands ask, and how they show it.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::client::{Client, Failed, parameter, path};
use crate::table::{self, Column};
use crate::{
    Balancing, Command, Constraints, Decide, Format, Group, Migration, Policy, Propose, Recovery,
    Rollback, Splitting, Token,
};

/// Asks, and prints the answer: as control gave it for programs, as a table for people.
struct Shown<'a, W> {
    client: &'a Client,
    json: bool,
    out: &'a mut W,
}

pub(crate) fn run(
    client: &Client,
    command: Command,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failed> {
    let mut shown = Shown { client, json, out };
    match command {
        Command::Status => shown.status(),
        Command::Workers => {
            let all = shown.pages(&path(&["workers"]), usize::MAX)?;
            shown.list(&all, WORKERS, "no worker has registered yet")
        }
        Command::Layers(group) => {
            let group = shown.group(group)?;
            let layers = shown.client.get(&path(&["groups", &group, "layers"]))?;
            shown.list(&layers, LAYERS, "no layers")
        }
        Command::Windows { group, layer, hours, limit, close } => {
            let group = shown.group(group)?;
            shown.windows(&path(&["groups", &group, "windows"]), (layer, hours), limit, close)
        }
        Command::Balance(group) => {
            let group = shown.group(group)?;
            let balance = shown.client.get(&path(&["groups", &group, "balancedness"]))?;
            shown.balance(&balance)
        }
        Command::Placement { group, layer } => {
            let group = shown.group(group)?;
            shown.placement(&group, layer)
        }
        Command::Propose(propose) => shown.propose(propose),
        Command::Tradeoffs { group, policy } => {
            let group = shown.group(group)?;
            let all = path(&["groups", &group, "tradeoffs"]);
            let found = shown.client.get(&format!("{all}?policy={policy}"))?;
            shown.list(&found, TRADEOFFS, "no layer had traffic")
        }
        Command::Proposals { group, limit } => {
            let group = shown.group(group)?;
            let all = shown.pages(&path(&["groups", &group, "proposals"]), limit.into())?;
            shown.list(&all, PROPOSALS, "nothing has been proposed yet")
        }
        Command::Diff { id } => {
            let proposal = shown.client.get(&path(&["proposals", &id]))?;
            shown.proposal(&proposal)
        }
        Command::Balancing(balancing) => shown.balancing(balancing),
        Command::Approve(decide) => shown.decide(decide, "approve"),
        Command::Reject(decide) => shown.decide(decide, "reject"),
        Command::Whatif { group, lost } => shown.loss(group, &lost),
        Command::Constraints(constraints) => shown.constraints(&constraints),
        Command::Migration(migration) => shown.migration(migration),
        Command::Recovery(recovery) => shown.recovery(recovery),
        Command::Rollback(rollback) => shown.roll_back(rollback),
        Command::Import { file, group, format, dry_run, reason } => {
            let group = shown.group(group)?;
            shown.import(&group, file, (format, dry_run), &reason)
        }
        Command::Export { group, format, out } => {
            let group = shown.group(group)?;
            shown.export(&group, format, out)
        }
        Command::Tactics { group, policy, settings, reason } => {
            let group = shown.group(group)?;
            shown.tactics(&path(&["groups", &group, "tactics"]), policy.zip(reason), settings)
        }
        Command::Splitting(splitting) => shown.splitting(splitting),
        Command::Policy(policy) => shown.policy(policy),
        Command::Token(token) => shown.token(token),
        Command::Audit { limit } => {
            let entries = shown.pages(&path(&["audit"]), limit.into())?;
            shown.list(&entries, AUDIT, "nothing has been changed yet")
        }
        // Needs no control.
        Command::Completions { .. } => Ok(()),
    }
}

const WORKERS: &[Column] = &[
    ("GROUP", "/group"),
    ("RANK", "/rank"),
    ("STATE", "/state"),
    ("HOST", "/host"),
    ("DEVICE", "/device"),
    ("SLOTS", "/slots_per_rank"),
    ("ENGINE", "/engine"),
    ("CALLS", "/calls"),
    ("REFUSED", "/refused"),
    ("LAST SEEN", "/last_seen_ms"),
];
const LAYERS: &[Column] = &[
    ("LAYER", "/number"),
    ("SERVED", "/served"),
    ("EXPERTS", "/shape/experts"),
    ("TOP-K", "/shape/top_k"),
    ("HIDDEN", "/shape/hidden"),
    ("INTERMEDIATE", "/shape/intermediate"),
    ("REASON", "/reason"),
];
const WINDOWS: &[Column] = &[
    ("END", "/end_ms"),
    ("LAYER", "/layer"),
    ("PHASE", "/phase"),
    ("RANKS", "/ranks"),
    ("CALLS", "/calls"),
    ("TOKENS", "/tokens"),
    ("P50 US", "/latency_us_p50"),
    ("P99 US", "/latency_us_p99"),
];
const BALANCE: &[Column] = &[
    ("LAYER", "/layer"),
    ("EPOCH", "/epoch"),
    ("PAIRS", "/assignments"),
    ("MAX/MEAN", "/max_over_mean"),
    ("BALANCEDNESS", "/balancedness"),
];
const PLACEMENTS: &[Column] = &[
    ("LAYER", "/layer"),
    ("EXPERTS", "/experts"),
    ("SLOTS A RANK", "/in_force/slots_per_rank"),
    ("IN FORCE", "/in_force/epoch"),
    ("ASKED", "/asked/epoch"),
    ("SOURCE", "/asked/source"),
    ("WAITING RANKS", "/waiting"),
    ("MOVING", "/moving"),
];
const EPOCHS: &[Column] = &[
    ("EPOCH", "/epoch"),
    ("SOURCE", "/source"),
    ("MADE", "/made_ms"),
    ("SLOTS A RANK", "/slots_per_rank"),
    ("EXPERT OF EACH SLOT", "/phy2log"),
];
const PROPOSALS: &[Column] = &[
    ("MADE", "/made_ms"),
    ("STANDING", "/standing"),
    ("POLICY", "/policy"),
    ("MOVED", "/moved"),
    ("BYTES", "/bytes"),
    ("ID", "/id"),
    ("EXPLANATION", "/explanation"),
];
const BALANCING: &[Column] = &[
    ("MODE", "/mode"),
    ("POLICY", "/ask/policy"),
    ("EVERY S", "/every_s"),
    ("APPROVES EXPERTS", "/approve/moved"),
    ("BYTES", "/approve/bytes"),
    ("ASKED", "/last/asked_ms"),
    ("PROPOSAL", "/last/proposal"),
    ("PROBLEM", "/last/problem"),
];
const LOSS: &[Column] =
    &[("LOST", "/lost"), ("EXPERTS GONE", "/gone"), ("BYTES", "/bytes"), ("ROOM", "/room")];
const LAYER_LOSS: &[Column] = &[
    ("LAYER", "/layer"),
    ("MAX/MEAN OF THE OTHERS", "/max_over_mean"),
    ("ROOM", "/room"),
    ("EXPERTS GONE", "/gone"),
];
const DRAINING: &[Column] = &[("LEAVES", "")];
const SPEEDS: &[Column] = &[("RANK", "/rank"), ("SPEED", "/speed")];
const PINS: &[Column] =
    &[("LAYER", "/layer"), ("EXPERT", "/expert"), ("RANK", "/rank"), ("PIN", "/kind")];
const RECOVERY: &[Column] =
    &[("AUTOMATIC", "/recovery/automatic"), ("GRACE S", "/recovery/grace_s")];
const SPLITTING: &[Column] = &[("POLICY", "/policy"), ("SETTINGS", "/settings")];
const LOST: &[Column] = &[
    ("LOST RANK", "/rank"),
    ("LAST SEEN MS", "/last_seen_ms"),
    ("GIVES UP MS", "/gives_up_ms"),
    ("GIVEN UP", "/given_up"),
];
const LACKING: &[Column] = &[("LAYER", "/layer"), ("LACKS EXPERTS", "/experts")];
const PACE: &[Column] = &[
    ("PAUSED", "/pace/paused"),
    ("LAYERS AT ONCE", "/pace/layers_at_once"),
    ("BYTES A SECOND", "/pace/bytes_per_second"),
    ("BYTES", "/bytes"),
    ("LEFT", "/bytes_left"),
    ("PROBLEM", "/problem"),
];
const MOTIONS: &[Column] = &[
    ("LAYER", "/layer"),
    ("FROM EPOCH", "/from_epoch"),
    ("TO", "/to_epoch"),
    ("SOURCE", "/source"),
    ("MADE", "/made_ms"),
    ("STEP", "/step"),
    ("SINCE", "/since_ms"),
    ("STUCK RANK", "/stuck/rank"),
    ("FOR S", "/stuck/seconds"),
    ("RANKS", "/ranks"),
];
const TRADEOFFS: &[Column] = &[
    ("MOVES A LAYER", "/moves_per_layer"),
    ("LAYERS", "/layers"),
    ("MOVED", "/moved"),
    ("BYTES", "/bytes"),
    ("MAX/MEAN", "/max_over_mean"),
    ("WORST", "/worst"),
    ("WORTH IT", "/worth_it"),
];
const CHANGES: &[Column] = &[
    ("LAYER", "/layer"),
    ("EPOCH", "/epoch"),
    ("MAX/MEAN", "/max_over_mean/before"),
    ("THEN", "/max_over_mean/after"),
    ("MS", "/milliseconds/before"),
    ("THEN", "/milliseconds/after"),
    ("MOVED", "/moved"),
];
const MOVES: &[Column] = &[
    ("LAYER", "/layer"),
    ("EXPERT", "/expert"),
    ("FROM RANK", "/source"),
    ("TO RANK", "/destination"),
    ("TO", "/purpose"),
    ("GAIN", "/gain"),
];
const IMPORTED: &[Column] = &[("LAYER", "/layer"), ("EPOCH", "/epoch"), ("CHANGED", "/changed")];
const VERSIONS: &[Column] = &[
    ("POLICY", "/name"),
    ("DECIDES", "/kind"),
    ("VERSION", "/version"),
    ("ACTIVE", "/active"),
    ("UPLOADED", "/uploaded_ms"),
    ("BY", "/actor"),
    ("DIGEST", "/digest"),
];
const RANK_TACTICS: &[Column] = &[
    ("RANK", "/rank"),
    ("DEVICE", "/measured_on/device"),
    ("DRIVER", "/measured_on/driver"),
    ("CHOSEN SIZES", "/chosen"),
    ("AS CHOSEN HERE", "/as_chosen"),
];
const CHOSEN: &[Column] = &[
    ("EXPERTS", "/problem/experts"),
    ("HIDDEN", "/problem/hidden"),
    ("INTERMEDIATE", "/problem/intermediate"),
    ("RANKS", "/problem/ranks"),
    ("ACT", "/problem/act"),
    ("TOKENS", "/tokens"),
    ("TACTIC", "/tactic"),
    ("US", "/us"),
    ("POLICY", "/policy"),
    ("STALE", "/stale"),
];
const SHADOWS: &[Column] = &[
    ("SHADOW", "/policy"),
    ("SETTINGS", "/settings"),
    ("MOVES A LAYER", "/budget/moves_per_layer"),
];
const LEAGUE: &[Column] = &[
    ("POLICY", "/policy"),
    ("SETTINGS", "/settings"),
    ("WINDOWS", "/windows"),
    ("MAX/MEAN", "/max_over_mean"),
    ("IN FORCE", "/in_force"),
    ("WORST", "/worst"),
    ("MOVED", "/moved"),
    ("FAILED", "/failed"),
    ("PROBLEM", "/problem"),
];
const VERDICTS: &[Column] =
    &[("WHEN", "/at_ms"), ("GROUP", "/group"), ("DIGEST", "/digest"), ("VERDICT", "/text")];
const TRIED: &[Column] = &[
    ("GROUP", "/group"),
    ("USES IT", "/uses"),
    ("LAYERS", "/layers"),
    ("FUEL", "/fuel"),
    ("EXPLANATION", "/explanation"),
    ("PROBLEM", "/problem"),
];
const TOKENS: &[Column] = &[
    ("ID", "/id"),
    ("NAME", "/name"),
    ("ROLE", "/role"),
    ("MADE", "/created_ms"),
    ("EXPIRES", "/expires_ms"),
    ("REVOKED", "/revoked_ms"),
];
const AUDIT: &[Column] = &[
    ("WHEN", "/at_ms"),
    ("WHO", "/actor"),
    ("ROLE", "/role"),
    ("ACTION", "/action"),
    ("TARGET", "/target"),
    ("BEFORE", "/before"),
    ("AFTER", "/after"),
    ("REASON", "/reason"),
];
const STATUS: &[Column] = &[
    ("GROUP", "/name"),
    ("MODEL", "/model"),
    ("RANKS", "/ranks"),
    ("MISSING", "/missing"),
    ("LAYERS", "/layers"),
    ("WORST MAX/MEAN", "/worst/max_over_mean"),
    ("OF LAYER", "/worst/layer"),
    ("PROBLEM", "/problem"),
];

/// Changes constraints as the command line says.
fn constrain(constraints: &mut Value, given: &Constraints) -> Result<(), Failed> {
    let Constraints { drain, rejoin, speed, must, never, unpin, .. } = given;
    let speeds = speed.iter().map(|text| speed_of(text)).collect::<Result<Vec<_>, _>>()?;
    let pins =
        |texts: &[String]| texts.iter().map(|text| pin_of(text)).collect::<Result<Vec<_>, _>>();
    let [must, never, unpin] = [pins(must)?, pins(never)?, pins(unpin)?];
    let list = |constraints: &mut Value, name: &str, change: &dyn Fn(&mut Vec<Value>)| {
        if let Some(items) = constraints[name].as_array_mut() {
            change(items);
        }
    };
    list(constraints, "draining", &|ranks| {
        ranks.retain(|rank| !drain.iter().chain(rejoin).any(|given| rank == given));
        ranks.extend(drain.iter().map(|rank| json!(rank)));
    });
    list(constraints, "speeds", &|known| {
        known.retain(|of| !speeds.iter().any(|given| given["rank"] == of["rank"]));
        known.extend(speeds.iter().filter(|of| of["speed"] != 1.0).cloned());
    });
    list(constraints, "pins", &|known| {
        let same = |one: &Value, other: &Value| {
            ["layer", "expert", "rank"].iter().all(|member| one[*member] == other[*member])
        };
        let given = || must.iter().chain(&never).chain(&unpin);
        known.retain(|pin| !given().any(|given| same(pin, given)));
        for (pins, kind) in [(&must, "must"), (&never, "never")] {
            known.extend(pins.iter().cloned().map(|mut pin| {
                pin["kind"] = json!(kind);
                pin
            }));
        }
    });
    Ok(())
}

/// Such as `3=0.8`.
fn speed_of(text: &str) -> Result<Value, Failed> {
    let parse = || {
        let (rank, speed) = text.split_once('=')?;
        let (rank, speed): (u32, f32) = (rank.parse().ok()?, speed.parse().ok()?);
        Some(json!({ "rank": rank, "speed": speed }))
    };
    let (what, value, expected) = ("--speed", text.to_owned(), "RANK=SPEED such as 3=0.8");
    parse().ok_or(Failed::Value { what, value, expected })
}

/// Such as `5@2` or `7:5@2`.
fn pin_of(text: &str) -> Result<Value, Failed> {
    let parse = || {
        let (layer, rest) = match text.split_once(':') {
            Some((layer, rest)) => (Some(layer.parse::<u32>().ok()?), rest),
            None => (None, text),
        };
        let (expert, rank) = rest.split_once('@')?;
        let (expert, rank): (u32, u32) = (expert.parse().ok()?, rank.parse().ok()?);
        Some(json!({ "layer": layer, "expert": expert, "rank": rank }))
    };
    let (what, value, expected) = ("a pin", text.to_owned(), "EXPERT@RANK or LAYER:EXPERT@RANK");
    parse().ok_or(Failed::Value { what, value, expected })
}

/// So many hours ago, in milliseconds since 1970.
fn hours_ago(hours: u32) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let then = now.saturating_sub(Duration::from_secs(u64::from(hours) * 3_600));
    u64::try_from(then.as_millis()).unwrap_or(u64::MAX)
}

/// First digits of a digest that stand for it.
const SHORTEST_DIGEST: usize = 4;

/// The choices of a table, each with what it is for and how long it was measured to take.
fn choices_of(table: &Value) -> Vec<Value> {
    let choice = |choice: &Value| {
        let mut choice = choice.clone();
        let mut measured = table["measurements"].as_array().into_iter().flatten();
        let same = |m: &&Value| m["tokens"] == choice["tokens"] && m["tactic"] == choice["tactic"];
        let us = measured.find(same).map(|measured| measured["median_us"].clone());
        choice["us"] = us.unwrap_or_default();
        for member in ["problem", "policy", "stale"] {
            choice[member] = table[member].clone();
        }
        choice
    };
    table["choices"].as_array().into_iter().flatten().map(choice).collect()
}

/// The versions of a policy, each with the policy's name and kind.
fn versions(policy: &Value) -> Vec<Value> {
    let named = |version: &Value| {
        let mut version = version.clone();
        for member in ["name", "kind"] {
            version[member] = policy[member].clone();
        }
        version
    };
    policy["versions"].as_array().into_iter().flatten().map(named).collect()
}

/// How far a rank is on its way to another placement of a layer.
fn rank_in_words(rank: &Value) -> String {
    let (number, left) = (&rank["rank"], &rank["bytes_left"]);
    match (rank["problem"].as_str(), &rank["staged"], &rank["ready"]) {
        (Some(problem), ..) => format!("{number}: {problem}"),
        (None, _, Value::Bool(true)) => format!("{number}: ready"),
        (None, Value::Bool(true), _) => format!("{number}: has it"),
        (None, ..) => format!("{number}: {left} bytes left"),
    }
}

/// Settings of a policy.
fn object(text: String) -> Result<Value, Failed> {
    let (what, expected) = ("--settings", "a JSON object");
    serde_json::from_str(&text).map_err(|_no_json| Failed::Value { what, value: text, expected })
}

impl<W: Write> Shown<'_, W> {
    /// The group that is meant.
    fn group(&self, given: Group) -> Result<String, Failed> {
        if let Some(group) = given.group {
            return Ok(group);
        }
        let groups = self.client.get(&path(&["groups"]))?;
        let names = groups.as_array().into_iter().flatten().filter_map(|g| g["name"].as_str());
        let names: Vec<&str> = names.collect();
        match names[..] {
            [one] => Ok(one.to_owned()),
            _ => {
                let expected = format!("--group with one of {names:?}");
                Err(Failed::Missing { what: "the group", expected })
            }
        }
    }

    /// Items of a list, page by page.
    fn pages(&self, path: &str, limit: usize) -> Result<Value, Failed> {
        let (mut items, mut cursor) = (Vec::new(), String::new());
        let joint = if path.contains('?') { '&' } else { '?' };
        loop {
            let count = limit.saturating_sub(items.len()).clamp(1, 500);
            let page = self.client.get(&format!("{path}{joint}limit={count}{cursor}"))?;
            items.extend(page["items"].as_array().into_iter().flatten().cloned());
            match page["next"].as_str() {
                Some(next) if items.len() < limit => cursor = format!("&cursor={next}"),
                _ => return Ok(Value::Array(items)),
            }
        }
    }

    fn list(&mut self, answer: &Value, columns: &[Column], none: &str) -> Result<(), Failed> {
        if self.json {
            return Ok(writeln!(self.out, "{answer:#}")?);
        }
        let items = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(table::print(self.out, items, columns, none)?)
    }

    fn status(&mut self) -> Result<(), Failed> {
        let mut groups = self.client.get(&path(&["groups"]))?;
        for group in groups.as_array_mut().into_iter().flatten() {
            let name = group["name"].as_str().unwrap_or_default().to_owned();
            let balance = self.client.get(&path(&["groups", &name, "balancedness"]))?;
            let mut layers = balance["layers"].as_array().into_iter().flatten();
            let worst = layers.find(|layer| layer["layer"] == balance["worst_layer"]);
            group["worst"] = worst.cloned().unwrap_or_default();
        }
        self.list(&groups, STATUS, "no worker has registered yet")
    }

    fn balance(&mut self, balance: &Value) -> Result<(), Failed> {
        if self.json {
            return Ok(writeln!(self.out, "{balance:#}")?);
        }
        self.list(&balance["layers"], BALANCE, "no layers")?;
        let over_layers = [("MIN", "/min"), ("P50", "/p50"), ("P90", "/p90"), ("AVG", "/avg")];
        let summary = &balance["balancedness"];
        let summary: &[Value] = if summary.is_null() { &[] } else { std::slice::from_ref(summary) };
        Ok(table::print(
            self.out,
            summary,
            &over_layers,
            "no layer had traffic under a placement in force",
        )?)
    }

    /// Windows of a layer or of all, by the hour or not, after the open ones were closed for a reason.
    fn windows(
        &mut self,
        windows: &str,
        (layer, hours): (Option<u32>, bool),
        limit: u16,
        close: Option<String>,
    ) -> Result<(), Failed> {
        if let Some(reason) = close {
            self.client.post(windows, &json!({ "reason": reason }))?;
        }
        let span = if hours { "hour" } else { "window" };
        let layer = layer.map_or_else(String::new, |layer| format!("&layer={layer}"));
        let newest = format!("{windows}?newest_first=true&span={span}{layer}");
        let found = self.pages(&newest, limit.into())?;
        self.list(&found, WINDOWS, "no window has been told yet")
    }

    fn export(&mut self, group: &str, format: Format, out: Option<PathBuf>) -> Result<(), Failed> {
        let export = path(&["groups", group, "export"]);
        let text = self.client.text(&format!("{export}?format={}", format.name()))?;
        match out {
            None => Ok(self.out.write_all(text.as_bytes())?),
            Some(path) => fs::write(&path, text).map_err(|source| Failed::Write { path, source }),
        }
    }

    fn propose(&mut self, propose: Propose) -> Result<(), Failed> {
        let Propose { group, policy, settings, layers, moves_per_layer, bytes, .. } = propose;
        let Propose { minimum_gain, valid_for_s, reason, .. } = propose;
        let settings = object(settings)?;
        let group = self.group(group)?;
        let budget =
            json!({ "layers": layers, "moves_per_layer": moves_per_layer, "bytes": bytes });
        let ask = json!({
            "policy": policy, "settings": settings, "budget": budget,
            "minimum_gain": minimum_gain, "valid_for_s": valid_for_s,
        });
        let body = json!({ "ask": ask, "reason": reason });
        let made = self.client.post(&path(&["groups", &group, "proposals"]), &body)?;
        self.proposal(&made)
    }

    fn loss(&mut self, group: Group, lost: &str) -> Result<(), Failed> {
        let group = self.group(group)?;
        let whatif = path(&["groups", &group, "whatif"]);
        let loss = self.client.get(&format!("{whatif}?{}", parameter("lost", lost)))?;
        if self.json {
            return Ok(writeln!(self.out, "{loss:#}")?);
        }
        self.list(&Value::Array(vec![loss.clone()]), LOSS, "")?;
        self.list(&loss["layers"], LAYER_LOSS, "no layers")
    }

    fn constraints(&mut self, given: &Constraints) -> Result<(), Failed> {
        let group = self.group(Group { group: given.group.group.clone() })?;
        let path = path(&["groups", &group, "constraints"]);
        let mut constraints = self.client.get(&path)?;
        if let Some(reason) = &given.reason {
            constrain(&mut constraints, given)?;
            let body = json!({ "constraints": constraints, "reason": reason });
            constraints = self.client.put(&path, &body)?;
        }
        if self.json {
            return Ok(writeln!(self.out, "{constraints:#}")?);
        }
        self.list(&constraints["draining"], DRAINING, "no rank is to leave")?;
        self.list(&constraints["speeds"], SPEEDS, "all ranks are equally fast")?;
        self.list(&constraints["pins"], PINS, "no expert is pinned")
    }

    fn migration(&mut self, given: Migration) -> Result<(), Failed> {
        let Migration { group, pause, resume, layers_at_once, bytes_per_second, reason } = given;
        let group = self.group(group)?;
        let path = path(&["groups", &group, "migration"]);
        let mut migration = self.client.get(&path)?;
        if let Some(reason) = reason {
            let mut pace = migration["pace"].take();
            for (name, value) in [
                ("paused", (pause || resume).then(|| json!(pause))),
                ("layers_at_once", layers_at_once.map(|layers| json!(layers))),
                ("bytes_per_second", bytes_per_second.map(|bytes| json!(bytes))),
            ] {
                if let Some(value) = value {
                    pace[name] = value;
                }
            }
            migration = self.client.put(&path, &json!({ "pace": pace, "reason": reason }))?;
        }
        if self.json {
            return Ok(writeln!(self.out, "{migration:#}")?);
        }
        let mut layers = migration["layers"].take();
        for layer in layers.as_array_mut().into_iter().flatten() {
            for rank in layer["ranks"].as_array_mut().into_iter().flatten() {
                *rank = json!(rank_in_words(rank));
            }
        }
        self.list(&Value::Array(vec![migration]), PACE, "")?;
        self.list(&layers, MOTIONS, "nothing is on its way")
    }

    fn recovery(&mut self, given: Recovery) -> Result<(), Failed> {
        let Recovery { group, grace, wait, automatic, reason } = given;
        let group = self.group(group)?;
        let path = path(&["groups", &group, "recovery"]);
        let mut view = self.client.get(&path)?;
        if let Some(reason) = reason {
            let mut recovery = view["recovery"].take();
            if wait || automatic {
                recovery["automatic"] = json!(automatic);
            }
            if let Some(grace) = grace {
                recovery["grace_s"] = json!(grace);
            }
            view = self.client.put(&path, &json!({ "recovery": recovery, "reason": reason }))?;
        }
        if self.json {
            return Ok(writeln!(self.out, "{view:#}")?);
        }
        self.list(&Value::Array(vec![view.clone()]), RECOVERY, "")?;
        self.list(&view["lost"], LOST, "no rank is lost")?;
        self.list(&view["lacking"], LACKING, "calls lack no expert")
    }

    fn roll_back(&mut self, rollback: Rollback) -> Result<(), Failed> {
        let Rollback { group, layer, epoch, reason } = rollback;
        let group = self.group(group)?;
        let to = layer.zip(epoch).map(|(layer, epoch)| json!({ "layer": layer, "epoch": epoch }));
        let body = match to {
            Some(to) => json!({ "layers": [to], "reason": reason }),
            None => json!({ "reason": reason }),
        };
        let layers = self.client.post(&path(&["groups", &group, "rollback"]), &body)?;
        self.list(&layers, IMPORTED, "no layers")
    }

    fn import(
        &mut self,
        group: &str,
        file: PathBuf,
        (format, dry_run): (Format, bool),
        reason: &str,
    ) -> Result<(), Failed> {
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(source) => return Err(Failed::Read { path: file, source }),
        };
        let body = json!({
            "format": format.name(), "text": text, "dry_run": dry_run, "reason": reason,
        });
        let layers = self.client.post(&path(&["groups", group, "import"]), &body)?;
        self.list(&layers, IMPORTED, "no layers")
    }

    fn balancing(&mut self, given: Balancing) -> Result<(), Failed> {
        let Balancing { mode, policy, settings, moves_per_layer, minimum_gain, .. } = &given;
        let group = self.group(Group { group: given.group.group.clone() })?;
        let path = path(&["groups", &group, "balancing"]);
        let mut balancing = self.client.get(&path)?;
        if let Some(reason) = &given.reason {
            let settings = settings.clone().map(object).transpose()?;
            for (pointer, value) in [
                ("/mode", mode.as_ref().map(|mode| json!(mode))),
                ("/ask/policy", policy.as_ref().map(|policy| json!(policy))),
                ("/ask/settings", settings),
                ("/ask/budget/moves_per_layer", moves_per_layer.map(|most| json!(most))),
                ("/ask/minimum_gain", minimum_gain.map(|gain| json!(gain))),
                ("/every_s", given.every_s.map(|every_s| json!(every_s))),
            ] {
                if let (Some(place), Some(value)) = (balancing.pointer_mut(pointer), value) {
                    *place = value;
                }
            }
            for (name, most) in [("moved", given.approve_moved), ("bytes", given.approve_bytes)] {
                if let Some(most) = most {
                    balancing["approve"][name] = json!(most);
                }
            }
            if let Some(members) = balancing.as_object_mut() {
                members.remove("last");
            }
            let body = json!({ "balancing": balancing, "reason": reason });
            balancing = self.client.put(&path, &body)?;
        }
        if self.json {
            return Ok(writeln!(self.out, "{balancing:#}")?);
        }
        self.list(&Value::Array(vec![balancing]), BALANCING, "nothing")
    }

    fn decide(&mut self, Decide { id, reason }: Decide, verb: &str) -> Result<(), Failed> {
        let body = json!({ "reason": reason });
        let decided = self.client.post(&path(&["proposals", &id, verb]), &body)?;
        self.proposal(&decided)
    }

    fn proposal(&mut self, proposal: &Value) -> Result<(), Failed> {
        if self.json {
            return Ok(writeln!(self.out, "{proposal:#}")?);
        }
        let text = |pointer: &str| proposal[pointer].as_str().unwrap_or_default();
        let [id, standing] = [text("id"), text("standing")];
        writeln!(self.out, "{id} {standing}\n{}: {}", text("policy"), text("explanation"))?;
        let withheld = proposal["withheld"].as_u64().unwrap_or(0);
        if withheld > 0 {
            let gain = &proposal["minimum_gain"];
            writeln!(
                self.out,
                "layers left as they are, for they gain less than {gain}: {withheld}"
            )?;
        }
        let ms = |when: &str| proposal["milliseconds"][when].as_f64();
        if let (Some(before), Some(after)) = (ms("before"), ms("after")) {
            let steps = proposal["payback_steps"].as_f64().map_or_else(
                || "which pays back never".to_owned(),
                |steps| format!("which pays back after {steps:.0} steps"),
            );
            writeln!(self.out, "predicted: {before:.3} ms a step, then {after:.3} ms, {steps}")?;
        }
        let decision = &proposal["decision"];
        if let (Some(actor), Some(reason)) =
            (decision["actor"].as_str(), decision["reason"].as_str())
        {
            writeln!(self.out, "{standing} by {actor}: {reason}")?;
        }
        self.list(&proposal["changes"], CHANGES, "nothing would change")?;
        let of_change = |change: &Value| {
            let layer = change["layer"].clone();
            let moves = change["moves"].as_array().cloned().unwrap_or_default();
            moves.into_iter().map(move |mut step| {
                step["layer"] = layer.clone();
                step
            })
        };
        let changes = proposal["changes"].as_array();
        let moves: Vec<Value> = changes.into_iter().flatten().flat_map(of_change).collect();
        if moves.is_empty() { Ok(()) } else { self.list(&Value::Array(moves), MOVES, "") }
    }

    fn placement(&mut self, group: &str, layer: Option<u32>) -> Result<(), Failed> {
        let all = path(&["groups", group, "placements"]);
        match layer {
            None => {
                let placements = self.client.get(&all)?;
                self.list(&placements, PLACEMENTS, "no layers")
            }
            Some(layer) => {
                let epochs = self.pages(&format!("{all}/{layer}/epochs"), usize::MAX)?;
                self.list(
                    &epochs,
                    EPOCHS,
                    "nothing is committed: workers hold what they are configured to",
                )
            }
        }
    }

    fn tactics(
        &mut self,
        path: &str,
        chooser: Option<(String, String)>,
        settings: String,
    ) -> Result<(), Failed> {
        let found = match chooser {
            Some((policy, reason)) => {
                let policy = self.digest(&policy)?.unwrap_or(policy);
                let chooser = json!({ "policy": policy, "settings": object(settings)? });
                self.client.put(path, &json!({ "chooser": chooser, "reason": reason }))?
            }
            None => self.client.get(path)?,
        };
        if self.json {
            return Ok(writeln!(self.out, "{found:#}")?);
        }
        self.list(&found["ranks"], RANK_TACTICS, "no rank has told of its tactics")?;
        let tables = found["tables"].as_array().into_iter().flatten();
        let choices = tables.flat_map(choices_of).collect();
        self.list(&Value::Array(choices), CHOSEN, "nothing was measured: moeplane-worker tune")
    }

    fn splitting(&mut self, given: Splitting) -> Result<(), Failed> {
        let Splitting { group, policy, settings, even, reason } = given;
        let path = path(&["groups", &self.group(group)?, "splitting"]);
        let found = match reason.filter(|_| even || policy.is_some()) {
            Some(reason) => {
                let digest = policy.as_deref().map(|policy| self.digest(policy)).transpose()?;
                let policy = digest.flatten().or(policy);
                let splitting = json!({ "policy": policy, "settings": object(settings)? });
                self.client.put(&path, &json!({ "splitting": splitting, "reason": reason }))?
            }
            None => self.client.get(&path)?,
        };
        if self.json {
            return Ok(writeln!(self.out, "{found:#}")?);
        }
        if found["policy"].is_null() {
            return Ok(writeln!(self.out, "tokens are split evenly over replicas")?);
        }
        self.list(&Value::Array(vec![found]), SPLITTING, "")
    }

    fn policy(&mut self, policy: Policy) -> Result<(), Failed> {
        let of = |policy: &str, verb: &str| path(&["policies", policy, verb]);
        match policy {
            Policy::List => {
                let all = self.client.get(&path(&["policies"]))?;
                if self.json {
                    return Ok(writeln!(self.out, "{all:#}")?);
                }
                let versions = all.as_array().into_iter().flatten().flat_map(versions).collect();
                self.list(&Value::Array(versions), VERSIONS, "no policies")
            }
            Policy::Show { policy } => {
                let digest = self.digest(&policy)?.unwrap_or(policy);
                let found = self.client.get(&path(&["policies", &digest]))?;
                self.versions(&found)
            }
            Policy::Upload { file, reason } => {
                let component = match fs::read(&file) {
                    Ok(component) => component,
                    Err(source) => return Err(Failed::Read { path: file, source }),
                };
                let to = format!("{}?{}", path(&["policies"]), parameter("reason", &reason));
                let made = self.client.upload(&to, &component)?;
                if self.json {
                    return Ok(writeln!(self.out, "{made:#}")?);
                }
                let text = |name: &str| made[name].as_str().unwrap_or_default();
                let [name, version, digest] = ["name", "version", "digest"].map(text);
                let before = if made["new"] == true { "" } else { ", which was there before" };
                writeln!(self.out, "{name} {version}{before}\n{digest}")?;
                self.list(&made["tried"], TRIED, "there is no group that it could be tried on")
            }
            Policy::Download { digest, out: path } => {
                let digest = self.digest(&digest)?.unwrap_or(digest);
                let component = self.client.bytes(&of(&digest, "component"))?;
                fs::write(&path, component).map_err(|source| Failed::Write { path, source })
            }
            Policy::Activate { digest, reason } => {
                let digest = self.digest(&digest)?.unwrap_or(digest);
                let body = json!({ "reason": reason });
                let now = self.client.post(&of(&digest, "activate"), &body)?;
                self.versions(&now)
            }
            Policy::Shadow { group, policy, settings, moves_per_layer, stop, reason } => {
                let group = self.group(group)?;
                let policy = self.digest(&policy)?.unwrap_or(policy);
                let budget = json!({ "moves_per_layer": moves_per_layer });
                let entrant =
                    json!({ "policy": policy, "settings": object(settings)?, "budget": budget });
                self.shadow(&path(&["groups", &group, "shadows"]), (entrant, stop), &reason)
            }
            Policy::League { group, hours } => {
                let group = self.group(group)?;
                let after_ms = hours.map_or(0, hours_ago);
                let shadows = path(&["groups", &group, "shadows"]);
                let found = self.client.get(&format!("{shadows}?after_ms={after_ms}"))?;
                self.league(&found)
            }
            Policy::Rollback { policy, reason } => {
                let body = json!({ "reason": reason });
                let now = self.client.post(&of(&policy, "rollback"), &body)?;
                self.versions(&now)
            }
        }
    }

    /// Adds a shadow, or takes those of its policy away.
    fn shadow(
        &mut self,
        path: &str,
        (entrant, stop): (Value, bool),
        reason: &str,
    ) -> Result<(), Failed> {
        let mut policies = self.client.get(path)?["policies"].take();
        if let Some(policies) = policies.as_array_mut() {
            if stop {
                policies.retain(|known| known["policy"] != entrant["policy"]);
            } else {
                policies.push(entrant);
            }
        }
        let body = json!({ "shadows": { "policies": policies }, "reason": reason });
        let now = self.client.put(path, &body)?;
        self.league(&now)
    }

    fn league(&mut self, shadows: &Value) -> Result<(), Failed> {
        if self.json {
            return Ok(writeln!(self.out, "{shadows:#}")?);
        }
        self.list(&shadows["policies"], SHADOWS, "nothing is asked in the shadow")?;
        self.list(&shadows["league"], LEAGUE, "no window came after a plan yet")
    }

    /// The digest that begins so, if one does and no other; names of policies are not shortened.
    fn digest(&self, begin: &str) -> Result<Option<String>, Failed> {
        let hexadecimal = begin.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !hexadecimal || begin.len() < SHORTEST_DIGEST {
            return Ok(None);
        }
        let all = self.client.get(&path(&["policies"]))?;
        let versions = all.as_array().into_iter().flatten().flat_map(versions);
        let digests = versions.filter_map(|version| Some(version["digest"].as_str()?.to_owned()));
        let mut found: Vec<String> = digests.filter(|digest| digest.starts_with(begin)).collect();
        Ok(if found.len() == 1 { found.pop() } else { None })
    }

    /// A policy with its versions, and what went wrong with it.
    fn versions(&mut self, policy: &Value) -> Result<(), Failed> {
        if self.json {
            return Ok(writeln!(self.out, "{policy:#}")?);
        }
        self.list(&Value::Array(versions(policy)), VERSIONS, "no version is there")?;
        self.list(&policy["verdicts"], VERDICTS, "nothing went wrong")
    }

    fn token(&mut self, token: Token) -> Result<(), Failed> {
        let made = match token {
            Token::List => {
                let all = self.pages(&path(&["tokens"]), usize::MAX)?;
                return self.list(&all, TOKENS, "no tokens");
            }
            Token::Whoami => {
                let own = Value::Array(vec![self.client.get(&path(&["tokens", "self"]))?]);
                return self.list(&own, &[("NAME", "/name"), ("ROLE", "/role")], "nobody");
            }
            Token::Revoke { id, reason } => {
                let revoke = path(&["tokens", &id.to_string(), "revoke"]);
                let revoked = self.client.post(&revoke, &json!({ "reason": reason }))?;
                return self.list(&Value::Array(vec![revoked]), TOKENS, "nothing");
            }
            Token::Make { name, role, expires_after_s, reason } => {
                let body = json!({
                    "name": name, "role": role, "expires_after_s": expires_after_s,
                    "reason": reason,
                });
                self.client.post(&path(&["tokens"]), &body)?
            }
            Token::Rotate { id, keep_s, reason } => {
                let body = json!({ "keep_s": keep_s, "reason": reason });
                self.client.post(&path(&["tokens", &id.to_string(), "rotate"]), &body)?
            }
        };
        if self.json {
            return Ok(writeln!(self.out, "{made:#}")?);
        }
        // Alone on its line, for scripts and for people.
        Ok(writeln!(self.out, "{}", made["secret"].as_str().unwrap_or_default())?)
    }
}
