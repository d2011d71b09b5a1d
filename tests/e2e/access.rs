//! Who may do what at the control plane.

use reference::layer::Variant;
use serde_json::{Value, json};
use tests::control_process::{Control, init};
use tests::group::{Group, Spec};
use tests::worker_process::{Worker, until};

use crate::{assert_says, skewed};

/// Every operation of the API: method, path, and the role that it needs.
fn operations(control: &Control) -> Vec<(String, String, Option<String>)> {
    let (_, document) = control.get("/api/v1/openapi.json").unwrap();
    let paths = document["paths"].as_object().unwrap();
    let of_path = |(path, operations): (&String, &Value)| {
        let of_method = |(method, operation): (&String, &Value)| {
            let role = operation["security"][0]["token"][0].as_str().map(str::to_owned);
            (method.to_uppercase(), path.clone(), role)
        };
        operations.as_object().unwrap().iter().map(of_method).collect::<Vec<_>>()
    };
    paths.iter().flat_map(of_path).collect()
}

/// The path with `value` for each of its parameters.
fn filled(path: &str, value: &str) -> String {
    let parts = path.split('/').map(|part| if part.starts_with('{') { value } else { part });
    parts.collect::<Vec<_>>().join("/")
}

fn secret(control: &Control, role: &str) -> String {
    let wanted = json!({"name": format!("a {role}"), "role": role});
    let (status, made) = control.post("/api/v1/tokens", &wanted).unwrap();
    assert_eq!(status, 201, "{made}");
    made["secret"].as_str().unwrap().to_owned()
}

#[test]
fn nothing_is_done_without_a_token_of_the_right_role() {
    let control = Control::start().unwrap();
    let tokens =
        ["viewer", "operator", "admin", "worker"].map(|role| (role, secret(&control, role)));
    let operations = operations(&control);
    let open: Vec<&str> =
        operations.iter().filter(|op| op.2.is_none()).map(|op| &op.1[..]).collect();
    assert_eq!(open, ["/healthz", "/readyz"]);
    assert!(operations.iter().any(|op| op.0 == "POST"));
    for (method, path, needed) in &operations {
        let Some(needed) = needed else { continue };
        let status =
            |token: Option<&str>| control.send(method, &filled(path, "7"), token, None).unwrap().0;
        assert_eq!(status(None), 401, "{method} {path} without a token");
        assert_eq!(status(Some("moep_0")), 401, "{method} {path} with a wrong token");
        for (role, token) in &tokens {
            let rank = |role: &str| ["viewer", "operator", "admin"].iter().position(|r| *r == role);
            let may = rank(role).is_some_and(|own| Some(own) >= rank(needed));
            assert_eq!(status(Some(token)) != 403, may, "{method} {path} as {role}");
        }
    }
}

#[test]
fn malformed_input_is_never_an_error_of_ours() {
    let control = Control::start().unwrap();
    let mut refused = 0;
    for (method, path, _) in operations(&control) {
        for value in ["7", "%00", "%ff", "-1", "99999999999999999999999", "a%2Fb", "%F0%9F%98%80"] {
            for query in
                ["", "?limit=x", "?limit=0", "?cursor=%00", "?after_ms=-1&until_ms=1e9", "?span=x"]
            {
                let path = filled(&path, value) + query;
                let bodies: &[_] = match &method[..] {
                    "GET" => &[None],
                    _ => &[
                        None,
                        Some("{"),
                        Some("[]"),
                        Some("{\"reason\": 7}"),
                        Some("{\"reason\": \" \"}"),
                    ],
                };
                for body in bodies {
                    let sent = control.send(&method, &path, Some(control.token()), *body);
                    let (status, text) = sent.unwrap_or_else(|e| panic!("{method} {path}: {e}"));
                    assert!(
                        status < 500 || path.starts_with("/readyz"),
                        "{method} {path} {body:?}: {text}"
                    );
                    refused += u32::from(status >= 400);
                }
            }
        }
    }
    assert!(refused > 500, "only {refused} were refused");
    // Too much.
    let body = format!("{{\"reason\": \"{}\"}}", "x".repeat(5 << 20));
    let token = Some(control.token());
    let (status, _) = control.send("POST", "/api/v1/groups/g/windows", token, Some(&body)).unwrap();
    assert_eq!(status, 413);
}

#[test]
fn the_first_token_is_made_once() {
    let control = Control::start().unwrap();
    let again = init(&control.data(), &[]).unwrap_err().to_string();
    assert_says(&again, &["has an admin token already, expected none"]);
    let other = init(&control.data(), &["--another"]).unwrap();
    let (status, text) = control.send("GET", "/api/v1/tokens/self", Some(&other), None).unwrap();
    assert_eq!((status, text.as_str()), (200, "{\"name\":\"admin\",\"role\":\"admin\"}"));
    assert!(!std::fs::read(control.data().join("control.sqlite")).unwrap().is_empty());
    let entries = std::fs::read_dir(control.data()).unwrap().map(|entry| entry.unwrap().path());
    for file in entries.filter(|path| path.is_file()) {
        let text = std::fs::read(file).unwrap();
        let found = text.windows(other.len()).any(|window| window == other.as_bytes());
        assert!(!found, "the secret is stored");
    }
}

#[test]
fn tokens_are_rotated_and_revoked_and_the_log_says_by_whom_and_why() {
    let control = Control::start().unwrap();
    let old = secret(&control, "viewer");
    let id = {
        let (_, all) = control.get("/api/v1/tokens").unwrap();
        let all = all["items"].as_array().unwrap();
        all.iter().find(|token| token["role"] == "viewer").unwrap()["id"].as_u64().unwrap()
    };
    let status = |token: &str| control.send("GET", "/api/v1/groups", Some(token), None).unwrap().0;
    assert_eq!(status(&old), 200);
    let (code, made) = control.post(&format!("/api/v1/tokens/{id}/rotate"), &json!({})).unwrap();
    assert_eq!((code, &made["name"], &made["role"]), (201, &json!("a viewer"), &json!("viewer")));
    let new = made["secret"].as_str().unwrap();
    assert_eq!((status(&old), status(new)), (401, 200));
    let path = format!("/api/v1/tokens/{}/revoke", made["id"]);
    assert_eq!(control.post(&path, &json!({})).unwrap().0, 200);
    assert_eq!(status(new), 401);
    let (code, problem) = control.post(&path, &json!({})).unwrap();
    assert_eq!((code, &problem["code"]), (409, &json!("conflict")));
    let (_, log) = control.get("/api/v1/audit?limit=1").unwrap();
    let entry = &log["items"][0];
    assert_eq!(
        (&entry["action"], &entry["actor"], &entry["target"], &entry["reason"]),
        (&json!("token.revoke"), &json!("admin"), &json!("a viewer"), &json!("a test"))
    );
    assert!(entry["before"]["revoked_ms"].is_null() && entry["after"]["revoked_ms"].is_u64());
    assert!(!entry["request_id"].as_str().unwrap().is_empty());
    let (_, before) = control.get(&format!("/api/v1/audit?cursor={}", entry["id"])).unwrap();
    assert_eq!(before["items"][0]["action"], "token.rotate");
}

#[test]
fn workers_whose_credential_ends_are_let_in_no_more() {
    let control = Control::start().unwrap();
    let spec = Spec { ranks: 1, placement: None, options: control.options() };
    let group = Group::start(&skewed(), &spec).unwrap();
    let there = || {
        let (_, page) = control.get("/api/v1/workers")?;
        anyhow::Ok(page["items"][0]["state"] == "connected")
    };
    until("a worker", || Ok(there()?.then_some(()))).unwrap();
    let (_, tokens) = control.get("/api/v1/tokens").unwrap();
    let tokens = tokens["items"].as_array().unwrap();
    let credential = tokens.iter().find(|token| token["role"] == "worker").unwrap();
    let path = format!("/api/v1/tokens/{}/revoke", credential["id"]);
    assert_eq!(control.post(&path, &json!({})).unwrap().0, 200);
    until("the end of its session", || Ok((!there()?).then_some(()))).unwrap();
    let told = "control refuses this worker: the credential has ended";
    until("a refusal", || Ok(group.workers[0].log().contains(told).then_some(()))).unwrap();
    // It serves on, and with a new credential it is back.
    group.workers[0].engine(Variant { nvfp4: false, weights_in_combine: false }, 1).unwrap();
    let fresh = secret(&control, "worker");
    std::fs::write(control.data().join("worker-credential"), fresh).unwrap();
    until("its return", || Ok(there()?.then_some(()))).unwrap();
}

#[test]
fn whoever_asks_too_often_is_told_to_wait() {
    let control = Control::start_with(&["--requests-per-second", "1"]).unwrap();
    let viewer = secret(&control, "viewer");
    let status = |token: &str| control.send("GET", "/api/v1/groups", Some(token), None).unwrap();
    assert_eq!(status(&viewer).0, 200);
    // Two may come at once, and one more in a second.
    let refused = (0..100).map(|_| status(&viewer)).find(|(status, _)| *status == 429);
    let (_, text) = refused.expect("all were let in");
    assert_says(&text, &["\"code\":\"rate\"", "too many requests, expected none for"]);
    // Others are not held up, nor are probes.
    assert_eq!(status(control.token()).0, 200);
    for _ in 0..12 {
        assert_eq!(control.send("GET", "/healthz", None, None).unwrap().0, 200);
    }
}

#[test]
fn with_tls_only_whoever_control_is_vouched_for_talks_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let [certificate, key] =
            ["crt", "key"].map(|end| folder.path().join(name).with_extension(end));
        std::fs::write(&certificate, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        (certificate, key)
    };
    let ((certificate, key), (other, other_key)) = (make("own"), make("other"));
    let control = Control::start_tls(&certificate, &key).unwrap();
    let spec = Spec { ranks: 2, placement: None, options: control.options() };
    let _group = Group::start(&skewed(), &spec).unwrap();
    until("workers over TLS", || {
        let (_, groups) = control.get("/api/v1/groups")?;
        Ok((groups[0]["missing"] == json!([])).then_some(()))
    })
    .unwrap();
    // A worker that trusts somebody else serves on by itself.
    let mut options = control.options();
    options[5] = other.display().to_string();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let stranger = Worker::start(&skewed(), &options).unwrap();
    until("a refusal", || Ok(stranger.log().contains("invalid peer certificate").then_some(())))
        .unwrap();
    // Without TLS there is no answer at all, and none with a key of another.
    let plain = format!("http://{}/healthz", control.address());
    ureq::get(&plain).call().unwrap_err();
    let error = Control::start_tls(&certificate, &other_key).unwrap_err().to_string();
    assert_says(&error, &["other.key does not belong to the certificate"]);
}
