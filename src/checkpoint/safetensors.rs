//! Safetensors checkpoints: one file or several shards, mapped into memory.
//!
//! Opening reads headers only; a tensor's bytes are paged in when they are first used and
//! are shared with every other process that serves the same file. The header is parsed and
//! checked (offsets, sizes, overflow) by the `safetensors` crate. A mapped file must not be
//! truncated while it is served: the operating system would then stop the program.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ::safetensors::SafeTensors;
use serde::Deserialize;

use super::{CheckpointError, FLOATS, StoredDType, TensorInfo, TensorSource, supported_dtype};
use crate::tensor::{Shape, Tensor};

/// Name of an unsharded checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";

/// Name of the file that lists the shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Bytes of the length that precedes the header.
const PREFIX_BYTES: usize = 8;

/// Read-only memory with the whole content of one safetensors file.
enum ShardBytes {
    Mapped(memmap2::Mmap),
    Static(&'static [u8]),
}

impl ShardBytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            ShardBytes::Mapped(map) => map,
            ShardBytes::Static(bytes) => bytes,
        }
    }
}

struct Entry {
    shard: Arc<ShardBytes>,
    file: Arc<str>,
    dtype: StoredDType,
    shape: Vec<usize>,
    /// Bytes of this tensor within the shard; checked to lie inside.
    bytes: Range<usize>,
}

/// The tensors of one or more safetensors files.
#[derive(Default)]
pub struct Checkpoint {
    entries: BTreeMap<String, Entry>,
    num_files: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`, in a folder.
    pub fn open(folder: &Path) -> Result<Checkpoint, CheckpointError> {
        let index = folder.join(INDEX_FILE);
        if folder.join(SINGLE_FILE).is_file() {
            let mut checkpoint = Checkpoint::default();
            checkpoint.add_file(&folder.join(SINGLE_FILE))?;
            return Ok(checkpoint);
        }
        if index.is_file() {
            return Checkpoint::open_sharded(folder, &index);
        }
        Err(CheckpointError::NoWeights {
            place: folder.display().to_string(),
            found: other_weights(folder),
        })
    }

    /// Reads a safetensors file that lies in the binary; `file` names it in messages.
    pub fn from_static(bytes: &'static [u8], file: &str) -> Result<Checkpoint, CheckpointError> {
        let mut checkpoint = Checkpoint::default();
        checkpoint.add_shard(ShardBytes::Static(bytes), file)?;
        Ok(checkpoint)
    }

    /// Number of files that hold the tensors.
    pub fn num_files(&self) -> usize {
        self.num_files
    }

    /// Bytes of all tensors together.
    pub fn size_bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.bytes.len()).sum()
    }

    fn open_sharded(folder: &Path, index_path: &Path) -> Result<Checkpoint, CheckpointError> {
        let weight_map = read_weight_map(index_path)?;
        let mut shards: Vec<&String> = weight_map.values().collect();
        shards.sort_unstable();
        shards.dedup();
        let mut checkpoint = Checkpoint::default();
        for shard in shards {
            let path = folder.join(shard);
            if !path.is_file() {
                return Err(CheckpointError::MissingShard {
                    index: INDEX_FILE.to_owned(),
                    shard: shard.clone(),
                });
            }
            checkpoint.add_file(&path)?;
        }
        for (name, shard) in &weight_map {
            let held = checkpoint.entries.get(name).is_some_and(|entry| *entry.file == **shard);
            if !held {
                return Err(CheckpointError::NotInShard {
                    index: INDEX_FILE.to_owned(),
                    shard: shard.clone(),
                    name: name.clone(),
                });
            }
        }
        Ok(checkpoint)
    }

    fn add_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read-only and only ever read as plain bytes; the module header
        // states that the file must not be truncated while it is served.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        self.add_shard(ShardBytes::Mapped(map), &name)
    }

    fn add_shard(&mut self, bytes: ShardBytes, file: &str) -> Result<(), CheckpointError> {
        let invalid =
            |reason: String| CheckpointError::InvalidSafetensors { file: file.to_owned(), reason };
        let shard = Arc::new(bytes);
        let content = shard.as_slice();
        let (header_len, metadata) =
            SafeTensors::read_metadata(content).map_err(|error| invalid(error.to_string()))?;
        let data_start = PREFIX_BYTES + header_len;
        let file: Arc<str> = file.into();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let bytes = data_start + start..data_start + end;
            // Already checked while parsing; a slice that could lie outside the map is not
            // left to the care of another crate.
            if content.get(bytes.clone()).is_none() {
                return Err(invalid(format!("{name} ends behind the end of the file")));
            }
            let entry = Entry {
                shard: Arc::clone(&shard),
                file: Arc::clone(&file),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes,
            };
            self.entries.insert(name, entry);
        }
        self.num_files += 1;
        Ok(())
    }
}

impl TensorSource for Checkpoint {
    fn names(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let entry = self.entries.get(name)?;
        Some(TensorInfo {
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            file: entry.file.to_string(),
        })
    }

    fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| CheckpointError::MissingTensor { name: name.to_owned() })?;
        let dtype =
            supported_dtype(entry.dtype).ok_or_else(|| CheckpointError::UnsupportedDType {
                name: name.to_owned(),
                dtype: entry.dtype.to_string(),
                supported: FLOATS,
                file: entry.file.to_string(),
            })?;
        if !(1..=4).contains(&entry.shape.len()) {
            return Err(CheckpointError::UnsupportedRank {
                name: name.to_owned(),
                rank: entry.shape.len(),
                file: entry.file.to_string(),
            });
        }
        let shape = Shape::from(entry.shape.as_slice());
        let bytes = &entry.shard.as_slice()[entry.bytes.clone()];
        let owner: Arc<dyn Any + Send + Sync> = Arc::clone(&entry.shard) as _;
        Ok(Tensor::from_shared(bytes, dtype, shape, owner)
            .unwrap_or_else(|| copy_misaligned(bytes, dtype, shape)))
    }
}

/// Copies bytes that start at an odd address; old writers did not pad the header.
fn copy_misaligned(bytes: &[u8], dtype: crate::tensor::DType, shape: Shape) -> Tensor {
    use crate::tensor::{DType, Fp8};
    let mut tensor = Tensor::zeros(dtype, shape);
    match dtype {
        DType::F32 => {
            for (out, raw) in tensor.as_mut_slice::<f32>().iter_mut().zip(bytes.chunks_exact(4)) {
                *out = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            }
        }
        DType::U32 => {
            for (out, raw) in tensor.as_mut_slice::<u32>().iter_mut().zip(bytes.chunks_exact(4)) {
                *out = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            }
        }
        DType::BF16 => {
            let values = tensor.as_mut_slice::<half::bf16>();
            for (out, raw) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = half::bf16::from_le_bytes([raw[0], raw[1]]);
            }
        }
        DType::I8 => {
            for (out, &byte) in tensor.as_mut_slice::<i8>().iter_mut().zip(bytes) {
                *out = byte.cast_signed();
            }
        }
        DType::U8 => tensor.as_mut_slice::<u8>().copy_from_slice(bytes),
        DType::Fp8 => {
            for (out, &byte) in tensor.as_mut_slice::<Fp8>().iter_mut().zip(bytes) {
                *out = Fp8(byte);
            }
        }
        DType::F16 => {
            let values = tensor.as_mut_slice::<half::f16>();
            for (out, raw) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                *out = half::f16::from_le_bytes([raw[0], raw[1]]);
            }
        }
    }
    tensor
}

/// Reads which shard holds which tensor; shard names stay inside the folder.
fn read_weight_map(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let malformed =
        |reason: String| CheckpointError::MalformedFile { file: INDEX_FILE.to_owned(), reason };
    let text = std::fs::read_to_string(path)
        .map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
    shards_of_index(&text).map_err(malformed)
}

/// Parses the text of an index into tensor name → shard name.
pub(super) fn shards_of_index(text: &str) -> Result<BTreeMap<String, String>, String> {
    let index: Index = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let outside = |shard: &&String| {
        Path::new(shard.as_str()).components().count() != 1
            || !shard.ends_with(".safetensors")
            || shard.contains(['/', '\\'])
    };
    match index.weight_map.values().find(outside) {
        Some(shard) => Err(format!("{shard:?} is not the name of a safetensors file")),
        None => Ok(index.weight_map),
    }
}

/// A weight file in a format that is not supported, to name it in the error.
fn other_weights(folder: &Path) -> Option<String> {
    let names = std::fs::read_dir(folder).ok()?.flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| [".bin", ".gguf", ".pth", ".pt"].iter().any(|end| name.ends_with(end)))
}
