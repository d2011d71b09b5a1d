//! The contract of policies: what its folder says of itself.

use std::path::Path;

use policy_host::store::digest;
use wit_parser::{Resolve, WorldItem, WorldKey};

/// What version 0.1 was released as. Its records are frozen: a change breaks every policy there is. What comes later comes
/// as new interfaces, or in another folder beside it.
const V0_1: [(&str, &str); 4] = [
    ("placement.wit", "c0866cc679d2fe01d3c62508ae0a5d9d70255185591c907f05217cffdc7bfff0"),
    ("routing.wit", "2544f7df9a211378a417c130319988a01755bd016049be6977f2eda1969a40af"),
    ("tactics.wit", "338726d7c3af37a812c28fcf2b155af176703108f49488d09ce5ce702952f07e"),
    ("types.wit", "2b36cfb13373225bca612c9b93d351aee2489eb11fa18d15586cf5d0d85a3b14"),
];

#[test]
fn the_contract_is_frozen() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit/v0.1");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<(String, String)> = files
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, digest(&std::fs::read(&path).unwrap()))
        })
        .collect();
    found.sort();
    assert_eq!(found, V0_1.map(|(name, digest)| (name.to_owned(), digest.to_owned())));
}

/// Each world exports its description and its decision, and brings nothing in but our own types.
#[test]
fn worlds_export_a_decision_and_import_nothing() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit/v0.1");
    let mut resolve = Resolve::new();
    let (package, _) = resolve.push_dir(folder).unwrap();
    let name = &resolve.packages[package].name;
    assert_eq!(name.to_string(), "moeplane:policy@0.1.0");
    let mut worlds = Vec::new();
    for (world, &id) in &resolve.packages[package].worlds {
        let interface = |key: &WorldKey| {
            let WorldKey::Interface(id) = key else { panic!("{world} has a bare {key:?}") };
            resolve.interfaces[*id].name.clone().unwrap()
        };
        let of = &resolve.worlds[id];
        let imports: Vec<String> = of.imports.keys().map(interface).collect();
        assert_eq!(imports, ["types"], "{world} imports");
        let types = of.imports.values().next().unwrap();
        let WorldItem::Interface { id: types, .. } = types else { panic!("{types:?}") };
        assert!(
            resolve.interfaces[*types].functions.is_empty(),
            "the types of {world} can be called"
        );
        let exports: Vec<String> = of.exports.keys().map(interface).collect();
        worlds.push((world.clone(), exports));
        for (key, item) in of.exports.iter().skip(1) {
            let WorldItem::Interface { id, .. } = item else { panic!("{key:?}") };
            let functions: Vec<&String> = resolve.interfaces[*id].functions.keys().collect();
            assert_eq!(functions, ["decide"], "{world}");
        }
    }
    worlds.sort();
    let expected = [("placement", "placer"), ("routing", "splitter"), ("tactics", "chooser")];
    let expected = expected
        .map(|(world, decision)| (world.to_owned(), vec!["meta".to_owned(), decision.to_owned()]));
    assert_eq!(worlds, expected);
}
