//! Looks at a component before anything is compiled: its size, that it imports nothing, and which decision of which
//! version of the contract it exports. Compiles and runs nothing.

use wasmparser::{Encoding, Parser, Payload};

use crate::limits::{COMPONENT_BYTES_MAX, NATIVE, Profile, SCRIPT};
use crate::question::Kind;
use crate::verdict::Verdict;

/// The version that this host runs; later ones of the same minor version are compatible.
pub const VERSION: &str = "0.1.0";

const PACKAGE: &str = "moeplane:policy/";

/// Records that worlds share are imported as types, which is no import: there is nothing to call. If there is something
/// after all, the component cannot be linked.
const TYPES: &str = "moeplane:policy/types@";

/// What a component is, as far as its outside says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// What it decides.
    pub kind: Kind,
    /// What it may use.
    pub profile: Profile,
}

/// Lets a component pass or says what is wrong with it.
///
/// # Errors
/// [`Verdict::TooLarge`], [`Verdict::Malformed`], [`Verdict::Imports`], [`Verdict::Version`] or
/// [`Verdict::Exports`].
pub fn check(component: &[u8]) -> Result<Passed, Verdict> {
    let bytes = component.len() as u64;
    if bytes > COMPONENT_BYTES_MAX {
        return Err(Verdict::TooLarge { bytes, limit: COMPONENT_BYTES_MAX });
    }
    let outside = outside(component)?;
    for name in outside.imports.iter().chain(&outside.exports) {
        let ours = name.strip_prefix(PACKAGE).and_then(|name| name.split_once('@'));
        if ours.is_some_and(|(_, version)| !compatible(version)) {
            return Err(Verdict::Version { found: name.clone(), expected: VERSION.to_owned() });
        }
    }
    if let Some(name) = outside.imports.into_iter().find(|name| !name.starts_with(TYPES)) {
        return Err(Verdict::Imports { name });
    }
    let kind = kind_of(&outside.exports)?;
    let native = outside.instances <= NATIVE.instances;
    Ok(Passed { kind, profile: if native { NATIVE } else { SCRIPT } })
}

struct Outside {
    imports: Vec<String>,
    exports: Vec<String>,
    /// Core instances, nested components included.
    instances: u32,
}

fn outside(component: &[u8]) -> Result<Outside, Verdict> {
    let malformed =
        |reason: &dyn std::fmt::Display| Verdict::Malformed { reason: reason.to_string() };
    let mut found = Outside { imports: Vec::new(), exports: Vec::new(), instances: 0 };
    let mut depth = 0_u32;
    for payload in Parser::new(0).parse_all(component) {
        match payload.map_err(|error| malformed(&error))? {
            Payload::Version { encoding: Encoding::Module, .. } if depth == 0 => {
                return Err(malformed(&"it is a core module, expected a component"));
            }
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::InstanceSection(section) => found.instances += section.count(),
            Payload::ComponentImportSection(section) if depth == 0 => {
                for import in section {
                    let import = import.map_err(|error| malformed(&error))?;
                    found.imports.push(import.name.name.to_owned());
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                for export in section {
                    let export = export.map_err(|error| malformed(&error))?;
                    found.exports.push(export.name.name.to_owned());
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

fn kind_of(exports: &[String]) -> Result<Kind, Verdict> {
    let interfaces: Vec<&str> =
        exports.iter().filter_map(|name| name.strip_prefix(PACKAGE)?.split('@').next()).collect();
    let kinds: Vec<Kind> =
        Kind::ALL.into_iter().filter(|kind| interfaces.contains(&kind.interface())).collect();
    match kinds[..] {
        [kind] if interfaces.contains(&"meta") => Ok(kind),
        _ => Err(Verdict::Exports { found: exports.to_vec() }),
    }
}

fn compatible(version: &str) -> bool {
    let series = |text: &str| text.rsplit_once('.').map(|(series, _)| series.to_owned());
    series(version) == series(VERSION)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exports(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn a_kind_needs_its_interface_and_meta() {
        let good = exports(&["moeplane:policy/meta@0.1.0", "moeplane:policy/placer@0.1.4"]);
        assert_eq!(kind_of(&good), Ok(Kind::Placement));
        let bare = exports(&["moeplane:policy/placer@0.1.0"]);
        assert!(matches!(kind_of(&bare), Err(Verdict::Exports { .. })));
        let both = exports(&[
            "moeplane:policy/meta@0.1.0",
            "moeplane:policy/placer@0.1.0",
            "moeplane:policy/chooser@0.1.0",
        ]);
        assert!(matches!(kind_of(&both), Err(Verdict::Exports { .. })));
        assert!(compatible("0.1.7") && !compatible("0.2.0") && !compatible("1.1.0"));
    }

    #[test]
    fn modules_and_garbage_are_named() {
        assert!(
            matches!(check(b"\0asm\x01\0\0\0"), Err(Verdict::Malformed { reason }) if reason.contains("core module"))
        );
        assert!(matches!(check(&[7; 10_000]), Err(Verdict::Malformed { .. })));
    }
}
