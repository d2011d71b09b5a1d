//! Makes components out of a few lines of WAT: all that a policy needs to be loaded, with the body of one function, or
//! one part of its answer, for a test to choose.

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// Where a component's answer to `decide` lies, and memory behind it that a test may fill.
pub(crate) const ANSWER: u32 = 2048;
pub(crate) const SPARE: u32 = 4096;

const TEXT: u32 = 64;
const TEXT_BYTES: u32 = 7;
const SETTINGS: u32 = 80;
const INFO: u32 = 1024;
const VALID: u32 = 1104;

/// A component to be. The default answers every question with an empty plan.
pub(crate) struct Guest {
    pub(crate) world: &'static str,
    pub(crate) interface: &'static str,
    /// Body of `decide`, which leaves the address of the answer.
    pub(crate) decide: String,
    /// Words of the answer.
    pub(crate) answer: Vec<u32>,
    /// Words behind it.
    pub(crate) spare: Vec<u32>,
    /// More of the module: functions, a start.
    pub(crate) more: String,
    /// What it calls itself, in seven letters.
    pub(crate) name: &'static str,
    /// Changes the text of the contract, as (from, to).
    pub(crate) contract: (&'static str, &'static str),
}

/// A text of the module, as (address, length).
pub(crate) const WORDS: [u32; 2] = [TEXT, TEXT_BYTES];

impl Guest {
    pub(crate) fn placement() -> Self {
        Self {
            world: "placement",
            interface: "placer",
            decide: format!("i32.const {ANSWER}"),
            // Ok; no changes; an explanation.
            answer: vec![0, SPARE, 0, TEXT, TEXT_BYTES],
            spare: Vec::new(),
            more: String::new(),
            name: "hostile",
            contract: ("", ""),
        }
    }

    pub(crate) fn tactics(decide: &str) -> Self {
        let decide = decide.to_owned();
        Self { world: "tactics", interface: "chooser", decide, ..Self::placement() }
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let mut core = wat::parse_str(self.wat()).unwrap();
        let mut resolve = Resolve::default();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../wit/v0.1");
        // The file with the package's name comes first.
        let files = ["types", "placement", "routing", "tactics"];
        let read = |file| std::fs::read_to_string(format!("{folder}/{file}.wit")).unwrap();
        let mut text: String = files.map(read).concat();
        if !self.contract.0.is_empty() {
            assert!(text.contains(self.contract.0));
            text = text.replace(self.contract.0, self.contract.1);
        }
        let package = resolve.push_str("policy.wit", &text).unwrap();
        let world = resolve.select_world(&[package], Some(self.world)).unwrap();
        embed_component_metadata(&mut core, &resolve, world, StringEncoding::UTF8).unwrap();
        ComponentEncoder::default().validate(true).module(&core).unwrap().encode().unwrap()
    }

    fn wat(&self) -> String {
        let Self { interface, decide, more, name, .. } = self;
        let version = if self.contract.1.contains("@0.2.0") { "0.2.0" } else { "0.1.0" };
        let text = [TEXT, TEXT_BYTES];
        let info: Vec<u32> = [text, text, text, [SETTINGS, 2]].concat();
        let (info, answer, spare) = (bytes(&info), bytes(&self.answer), bytes(&self.spare));
        format!(
            r#"(module
  {more}
  (memory (export "memory") 4)
  (global $next (mut i32) (i32.const 65536))
  (data (i32.const {TEXT}) "{name}") (data (i32.const {SETTINGS}) "{{}}")
  (data (i32.const {INFO}) "{info}")
  (data (i32.const {ANSWER}) "{answer}") (data (i32.const {SPARE}) "{spare}")
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (global.set $next (i32.and (i32.add (global.get $next) (i32.const 15)) (i32.const -16)))
    global.get $next
    (global.set $next (i32.add (global.get $next) (local.get 3))))
  (func (export "moeplane:policy/meta@{version}#describe") (result i32) i32.const {INFO})
  (func (export "moeplane:policy/meta@{version}#validate") (param i32 i32) (result i32)
    i32.const {VALID})
  (func (export "moeplane:policy/{interface}@{version}#decide") (param i32) (result i32)
    {decide}))"#
        )
    }
}

fn bytes(words: &[u32]) -> String {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    bytes.map(|byte| format!("\\{byte:02x}")).collect()
}

/// A module that is small and takes a compiler very long: thousands of variables live over a jump
/// table with many targets.
pub(crate) fn compile_bomb() -> Guest {
    const VARIABLES: u32 = 5000;
    const TARGETS: u32 = 1500;
    let mut body = format!(
        "(func $bomb (param i32) (result i32) (local{})\n",
        " i32".repeat(VARIABLES as usize)
    );
    for variable in 1..=VARIABLES {
        body += &format!("(local.set {variable} (i32.mul (local.get 0) (i32.const {variable})))\n");
    }
    body += &"(block ".repeat(TARGETS as usize);
    let targets: String = (0..TARGETS).map(|target| format!(" {target}")).collect();
    body += &format!("(br_table{targets} (local.get 0))");
    for target in 0..TARGETS {
        let variable = 1 + target * 3;
        body +=
            &format!(")\n(local.set {variable} (i32.add (local.get {variable}) (i32.const 1)))");
    }
    body += "\n(i32.const 0)";
    for variable in 1..=VARIABLES {
        body += &format!("(i32.xor (local.get {variable}))\n");
    }
    body += ")";
    Guest { more: body, decide: "(call $bomb (local.get 0))".to_owned(), ..Guest::placement() }
}
