//! The kernel pack: every unit's code for some architectures in one file.
//!
//! Layout: `SWKPACK1`, SHA-256 of the rest, length of the index (u64, little endian), the index as
//! JSON, then the deflated codes one after the other. The index names the sources' hash, so a pack
//! of another version is refused and not half used.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use flate2::{Compression, read::DeflateDecoder, write::DeflateEncoder};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    Arch, CudaError, UNITS, Unit,
    nvrtc::{Compiled, Nvrtc, Usage},
    source_hash,
};

const MAGIC: &[u8; 8] = b"SWKPACK1";
/// Where a package puts the pack.
const INSTALLED: &str = "/usr/lib/secondwind/kernels.pack";

/// What a unit is compiled to, and for what.
type Key = (String, Arch, Form);

/// Machine code or PTX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// Runs on its own architecture without any compilation.
    Cubin,
    /// Compiled by the driver for any newer card.
    Ptx,
}

/// A unit's code and the kernels in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Code {
    /// As the driver loads it.
    pub bytes: Vec<u8>,
    /// Symbols; drivers before 12.4 cannot list them.
    pub kernels: Vec<String>,
}

/// Code of units, by architecture and form.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pack {
    codes: BTreeMap<Key, Code>,
}

#[derive(Serialize, Deserialize)]
struct Index {
    source_hash: String,
    codes: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    unit: String,
    arch: String,
    form: Form,
    kernels: Vec<String>,
    deflated_bytes: usize,
}

impl Pack {
    /// Compiles every unit for `archs` on all cores; `each` then hears of every (unit, architecture).
    ///
    /// # Errors
    /// The first unit that does not compile.
    pub fn build(
        nvrtc: &Nvrtc,
        archs: &[Arch],
        mut each: impl FnMut(&'static str, Arch, &[Usage]),
    ) -> Result<Self, CudaError> {
        let wanted: Vec<(Arch, &Unit)> = archs
            .iter()
            .flat_map(|&arch| UNITS.iter().map(move |unit| (arch, unit)))
            .filter(|(arch, unit)| unit.is_built_for(*arch))
            .collect();
        let compiled: Vec<Result<Compiled, CudaError>> = wanted
            .par_iter()
            .map(|(arch, unit)| nvrtc.compile(unit, *arch))
            .collect();
        let mut pack = Self::default();
        for ((arch, unit), compiled) in wanted.into_iter().zip(compiled) {
            let Compiled { cubin, ptx, usage } = compiled?;
            each(unit.name, arch, &usage);
            let kernels: Vec<String> = usage.into_iter().map(|usage| usage.kernel).collect();
            for (form, bytes) in [(Form::Cubin, cubin), (Form::Ptx, ptx.into_bytes())] {
                let code = Code {
                    bytes,
                    kernels: kernels.clone(),
                };
                pack.codes.insert((unit.name.to_owned(), arch, form), code);
            }
        }
        Ok(pack)
    }

    /// Units' code for one architecture and form.
    pub fn codes(&self, arch: Arch, form: Form) -> impl Iterator<Item = (&str, &Code)> {
        self.codes
            .iter()
            .filter(move |((_, of, is), _)| *of == arch && *is == form)
            .map(|((unit, ..), code)| (unit.as_str(), code))
    }

    /// True if every unit is there for `arch`.
    pub fn covers(&self, arch: Arch) -> bool {
        UNITS
            .iter()
            .filter(|unit| unit.is_built_for(arch))
            .all(|unit| {
                [Form::Cubin, Form::Ptx].iter().all(|form| {
                    self.codes
                        .contains_key(&(unit.name.to_owned(), arch, *form))
                })
            })
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut blob = Vec::new();
        let mut index = Index {
            source_hash: source_hash(),
            codes: Vec::new(),
        };
        for ((unit, arch, form), code) in &self.codes {
            let start = blob.len();
            let mut encoder = DeflateEncoder::new(&mut blob, Compression::default());
            // Writing to memory does not fail.
            let _ = encoder
                .write_all(&code.bytes)
                .and_then(|()| encoder.try_finish());
            drop(encoder);
            index.codes.push(Entry {
                unit: unit.clone(),
                arch: arch.name().to_owned(),
                form: *form,
                kernels: code.kernels.clone(),
                deflated_bytes: blob.len() - start,
            });
        }
        let index = serde_json::to_vec(&index).expect("names and numbers are JSON");
        let mut body = (index.len() as u64).to_le_bytes().to_vec();
        body.extend(index);
        body.extend(blob);
        [MAGIC.as_slice(), &Sha256::digest(&body), &body].concat()
    }

    /// Reads what [`Pack::to_bytes`] wrote.
    ///
    /// # Errors
    /// Damage, or a pack of other sources; the text names no file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let body = bytes.strip_prefix(MAGIC).ok_or("it is no kernel pack")?;
        let (digest, body) = body.split_at_checked(32).ok_or("it is cut off")?;
        if Sha256::digest(body).as_slice() != digest {
            return Err("it is damaged: its checksum does not match".into());
        }
        let (length, rest) = body.split_first_chunk::<8>().ok_or("it is cut off")?;
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| "it is cut off")?;
        let (index, mut blob) = rest.split_at_checked(length).ok_or("it is cut off")?;
        let index: Index = serde_json::from_slice(index).map_err(|error| error.to_string())?;
        if index.source_hash != source_hash() {
            return Err("it was built from the kernels of another version".into());
        }
        let mut pack = Self::default();
        for entry in index.codes {
            let (deflated, rest) = blob
                .split_at_checked(entry.deflated_bytes)
                .ok_or("it is cut off")?;
            blob = rest;
            let mut bytes = Vec::new();
            DeflateDecoder::new(deflated)
                .read_to_end(&mut bytes)
                .map_err(|error| error.to_string())?;
            let arch = entry
                .arch
                .parse()
                .map_err(|error: CudaError| error.to_string())?;
            let code = Code {
                bytes,
                kernels: entry.kernels,
            };
            pack.codes.insert((entry.unit, arch, entry.form), code);
        }
        Ok(pack)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`CudaError::Pack`] with file and problem.
    pub fn read(path: &Path) -> Result<Self, CudaError> {
        let problem = |problem: String| CudaError::Pack {
            path: path.display().to_string(),
            problem,
        };
        let bytes = std::fs::read(path).map_err(|error| problem(error.to_string()))?;
        Self::from_bytes(&bytes).map_err(problem)
    }

    /// Writes a file: beside its place first, so that no reader meets half of it.
    ///
    /// # Errors
    /// [`CudaError::Pack`] with the system's words.
    pub fn write(&self, path: &Path) -> Result<(), CudaError> {
        let beside = path.with_extension(format!("{}.tmp", std::process::id()));
        std::fs::write(&beside, self.to_bytes())
            .and_then(|()| std::fs::rename(&beside, path))
            .map_err(|error| CudaError::Pack {
                path: path.display().to_string(),
                problem: error.to_string(),
            })
    }
}

/// Where a worker's kernels come from.
#[derive(Debug, Clone, Default)]
pub struct PackSource {
    /// A pack that must be used.
    pub pack: Option<PathBuf>,
    /// NVRTC by path instead of by name.
    pub nvrtc: Option<PathBuf>,
    /// Folder for what is compiled here; `None` keeps nothing.
    pub cache: Option<PathBuf>,
}

impl PackSource {
    /// The pack that the operator names, the installed one or the cached one, with its place.
    ///
    /// # Errors
    /// A named pack that is of no use.
    pub fn find(&self, arch: Arch) -> Result<Option<(PathBuf, Pack)>, CudaError> {
        if let Some(path) = &self.pack {
            let pack = Pack::read(path)?;
            if !pack.covers(arch) {
                let problem = format!("it has no code for {arch}");
                return Err(CudaError::Pack {
                    path: path.display().to_string(),
                    problem,
                });
            }
            return Ok(Some((path.clone(), pack)));
        }
        let places = [Some(PathBuf::from(INSTALLED)), self.cached(arch)];
        // One of another version, or damaged, is as good as none: another is compiled.
        let found = places.into_iter().flatten().find_map(|path| {
            let pack = Pack::read(&path).ok().filter(|pack| pack.covers(arch))?;
            Some((path, pack))
        });
        Ok(found)
    }

    /// The pack of [`PackSource::find`], or one compiled now for `arch` alone, and then cached.
    /// `note` hears where it came from.
    ///
    /// # Errors
    /// A named pack that is of no use, or nothing to compile with.
    pub fn load(&self, arch: Arch, mut note: impl FnMut(String)) -> Result<Pack, CudaError> {
        if let Some((path, pack)) = self.find(arch)? {
            note(format!("kernels from {}", path.display()));
            return Ok(pack);
        }
        let nvrtc = Nvrtc::open(self.nvrtc.as_deref())?;
        let (major, minor) = nvrtc.version();
        note(format!(
            "compiling kernels for {arch} with NVRTC {major}.{minor}, once"
        ));
        let pack = Pack::build(&nvrtc, &[arch], |_, _, _| {})?;
        if let Some(path) = self.cached(arch) {
            // A cache that cannot be written costs time at the next start, nothing else.
            let folder = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            let written = folder
                .map_err(|error| error.to_string())
                .and_then(|()| pack.write(&path).map_err(|error| error.to_string()));
            match written {
                Ok(()) => note(format!("kept in {}", path.display())),
                Err(error) => note(format!("not kept: {error}")),
            }
        }
        Ok(pack)
    }

    fn cached(&self, arch: Arch) -> Option<PathBuf> {
        let name = format!("kernels-{arch}-{}.pack", &source_hash()[..16]);
        Some(self.cache.as_ref()?.join(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack() -> Pack {
        let mut pack = Pack::default();
        for (index, unit) in UNITS.iter().enumerate() {
            for form in [Form::Cubin, Form::Ptx] {
                let bytes = vec![index as u8; 1000 * index];
                let code = Code {
                    bytes,
                    kernels: vec![format!("kernel_{index}")],
                };
                pack.codes
                    .insert((unit.name.to_owned(), Arch::Sm61, form), code);
            }
        }
        pack
    }

    #[test]
    fn what_is_written_is_read_and_damage_is_named() {
        let pack = pack();
        let bytes = pack.to_bytes();
        assert_eq!(Pack::from_bytes(&bytes).unwrap(), pack);
        for cut in [0, 7, 20, 44, bytes.len() - 1] {
            assert!(Pack::from_bytes(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut other = bytes.clone();
        other[60] ^= 1;
        assert!(Pack::from_bytes(&other).unwrap_err().contains("damaged"));
    }

    #[test]
    fn a_pack_covers_an_architecture_only_whole() {
        let mut pack = pack();
        let built = |arch| {
            UNITS
                .iter()
                .filter(move |unit| unit.is_built_for(arch))
                .count()
        };
        assert!(pack.covers(Arch::Sm61) && !pack.covers(Arch::Sm75));
        assert_eq!(pack.codes(Arch::Sm61, Form::Ptx).count(), UNITS.len());
        assert!(built(Arch::Sm61) <= UNITS.len());
        pack.codes
            .remove(&(UNITS[0].name.to_owned(), Arch::Sm61, Form::Ptx));
        assert!(!pack.covers(Arch::Sm61));
    }

    #[test]
    fn a_named_pack_is_used_or_refused_but_never_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernels.pack");
        pack().write(&path).unwrap();
        let source = PackSource {
            pack: Some(path.clone()),
            ..PackSource::default()
        };
        source.load(Arch::Sm61, |_| {}).unwrap();
        let error = source.load(Arch::Sm75, |_| {}).unwrap_err().to_string();
        assert!(error.contains("no code for sm_75"), "{error}");
        std::fs::write(&path, b"something else").unwrap();
        let error = source.load(Arch::Sm61, |_| {}).unwrap_err().to_string();
        assert!(error.contains("no kernel pack"), "{error}");
    }
}
