//! Keeps compiled components on disk and vouches for them: wasmtime checks neither who made a compiled file nor
//! whether it was changed. Compiles nothing.
//!
//! A file `<digest>.<fingerprint>.compiled` is a MAC over its name and the code, then the code. The key is made at
//! first use and never leaves the folder. Files are written beside and renamed: nobody reads half of one, and nobody
//! who reads one sees it change.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write as _};
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::engine::FINGERPRINT;
use crate::limits::COMPILED_BYTES_MAX;
use crate::verdict::Verdict;

const MAC_BYTES: usize = 32;
const KEY_BYTES: usize = 32;

/// SHA-256 of a component in lower case hexadecimal: its name everywhere.
#[must_use]
pub fn digest(component: &[u8]) -> String {
    Sha256::digest(component).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compiled code that this installation made.
pub(crate) struct Sealed(Vec<u8>);

impl Sealed {
    pub(crate) fn code(&self) -> &[u8] {
        self.0.get(MAC_BYTES..).unwrap_or_default()
    }
}

/// What the folder has for a component.
pub(crate) enum Found {
    /// Its code.
    Code(Sealed),
    /// No file.
    Nothing,
    /// A file that must not be run, and why. As good as none, but somebody should know.
    Unusable(String),
}

/// The folder of compiled components, and the key of this installation.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    key: [u8; KEY_BYTES],
}

impl Store {
    /// Opens `folder`, which is made, with a key, where there is none.
    ///
    /// # Errors
    /// [`Verdict::Host`]: the folder or the key cannot be made or read.
    pub fn open(folder: &Path) -> Result<Self, Verdict> {
        let failed = |error| Verdict::host(&format!("opening {}", folder.display()), error);
        fs::create_dir_all(folder).map_err(failed)?;
        Ok(Self { folder: folder.to_owned(), key: key(folder).map_err(failed)? })
    }

    /// Where the code of the component with this digest is kept.
    #[must_use]
    pub fn path(&self, digest: &str) -> PathBuf {
        self.folder.join(name(digest))
    }

    /// Keeps code that the compiler made.
    pub(crate) fn seal(&self, digest: &str, code: &[u8]) -> Result<Sealed, Verdict> {
        let mut bytes = self.mac(digest, code).finalize().into_bytes().to_vec();
        bytes.extend_from_slice(code);
        let path = self.path(digest);
        let failed = |error| Verdict::host(&format!("writing {}", path.display()), error);
        let mut draft = tempfile::NamedTempFile::new_in(&self.folder).map_err(failed)?;
        draft.write_all(&bytes).map_err(failed)?;
        draft.persist(&path).map_err(|refused| failed(refused.error))?;
        Ok(Sealed(bytes))
    }

    pub(crate) fn find(&self, digest: &str) -> Result<Found, Verdict> {
        let path = self.path(digest);
        let failed = |error| Verdict::host(&format!("reading {}", path.display()), error);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(self.other(digest)),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        let most = COMPILED_BYTES_MAX + MAC_BYTES as u64;
        file.take(most + 1).read_to_end(&mut bytes).map_err(failed)?;
        let unusable = |why: &str| Ok(Found::Unusable(format!("{} {why}", path.display())));
        let Some((mac, code)) = bytes.split_at_checked(MAC_BYTES) else {
            return unusable("is cut short");
        };
        if bytes.len() as u64 > most {
            return unusable("is longer than any that the compiler makes");
        }
        match self.mac(digest, code).verify_slice(mac) {
            Ok(()) => Ok(Found::Code(Sealed(bytes))),
            Err(_differs) => unusable("was changed, or is not of this installation"),
        }
    }

    /// Files of the component under other fingerprints are left alone: a host of that version may use them.
    fn other(&self, digest: &str) -> Found {
        let prefix = format!("{digest}.");
        let names = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let mut names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.find(|name| name.starts_with(&prefix)).map_or(Found::Nothing, |name| {
            Found::Unusable(format!("{name} was made for another version of this program"))
        })
    }

    fn mac(&self, digest: &str, code: &[u8]) -> Hmac<Sha256> {
        let mut block = hmac::digest::Key::<Hmac<Sha256>>::default();
        block.iter_mut().zip(self.key).for_each(|(to, from)| *to = from);
        let mut mac = Hmac::<Sha256>::new(&block);
        mac.update(name(digest).as_bytes());
        mac.update(b"\0");
        mac.update(code);
        mac
    }
}

fn name(digest: &str) -> String {
    format!("{digest}.{FINGERPRINT}-{}.compiled", std::env::consts::ARCH)
}

/// Reads the key, after making one where there is none. Of two processes that make one, the first wins.
fn key(folder: &Path) -> std::io::Result<[u8; KEY_BYTES]> {
    let path = folder.join("key");
    if !path.exists() {
        let mut fresh = [0_u8; KEY_BYTES];
        getrandom::fill(&mut fresh).map_err(|error| std::io::Error::other(error.to_string()))?;
        // A draft is its owner's alone, and so is what it becomes.
        let mut draft = tempfile::NamedTempFile::new_in(folder)?;
        draft.write_all(&fresh)?;
        draft.as_file().sync_all()?;
        match draft.persist_noclobber(&path) {
            Err(refused) if refused.error.kind() != ErrorKind::AlreadyExists => {
                return Err(refused.error);
            }
            _ => {}
        }
    }
    let mut key = [0; KEY_BYTES];
    File::open(&path)?.read_exact(&mut key)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn unusable(store: &Store, digest: &str) -> String {
        match store.find(digest).unwrap() {
            Found::Unusable(why) => why,
            Found::Code(_) => panic!("{digest} would be run"),
            Found::Nothing => panic!("{digest} is not there"),
        }
    }

    #[test]
    fn code_is_found_only_unchanged_under_its_own_name_and_key() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.seal("aa", b"machine code").unwrap();
        let again = Store::open(folder.path()).unwrap();
        assert!(matches!(again.find("aa"), Ok(Found::Code(c)) if c.code() == b"machine code"));
        assert!(matches!(again.find("bb"), Ok(Found::Nothing)));

        fs::copy(store.path("aa"), store.path("bb")).unwrap();
        assert!(unusable(&store, "bb").contains("was changed"));

        let mut bytes = fs::read(store.path("aa")).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(store.path("aa"), &bytes).unwrap();
        assert!(unusable(&store, "aa").contains("was changed"));
        fs::write(store.path("aa"), b"short").unwrap();
        assert!(unusable(&store, "aa").contains("cut short"));

        let other = tempfile::tempdir().unwrap();
        let foreign = Store::open(other.path()).unwrap();
        foreign.seal("aa", b"machine code").unwrap();
        fs::copy(foreign.path("aa"), store.path("aa")).unwrap();
        assert!(unusable(&store, "aa").contains("not of this installation"));

        fs::write(folder.path().join("cc.wasmtime-1.compiled"), b"of last year").unwrap();
        assert!(unusable(&store, "cc").contains("another version"));
    }

    #[test]
    fn the_key_is_its_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        drop(Store::open(folder.path()).unwrap());
        let mode = fs::metadata(folder.path().join("key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
