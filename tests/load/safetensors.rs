//! Checkpoints on disk: what is read, and what is refused with which sentence.

use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use tokenmill::checkpoint::{Checkpoint, CheckpointError, TensorSource};
use tokenmill::tensor::DType;

/// Writes a file with one bf16 tensor `[2, 3]` per name, filled with `1, 2, ... 6`.
fn write_shard(path: &Path, names: &[&str]) {
    let values: Vec<u8> = (1..=6u8).flat_map(|v| bf16::from_f32(v.into()).to_le_bytes()).collect();
    let view = |name: &&str| {
        (name.to_string(), TensorView::new(Dtype::BF16, vec![2, 3], &values).unwrap())
    };
    serialize_to_file(names.iter().map(view), None, path).unwrap();
}

fn write_index(folder: &Path, entries: &[(&str, &str)]) {
    let map: serde_json::Map<_, _> =
        entries.iter().map(|(name, shard)| (name.to_string(), (*shard).into())).collect();
    let index = serde_json::json!({"metadata": {"total_size": 24}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A file with this header over `num_bytes` bytes of data, not checked by any library.
fn raw_file(header: &str, num_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend((0..num_bytes).map(|i| i as u8));
    file
}

fn message(result: Result<Checkpoint, CheckpointError>) -> String {
    match result {
        Ok(_) => panic!("opened what should have been refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_single_file_is_read_in_place() {
    let folder = tempfile::tempdir().unwrap();
    write_shard(&folder.path().join("model.safetensors"), &["b", "a"]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names(), ["a", "b"]);
    assert_eq!(checkpoint.size_bytes(), 24);
    let info = checkpoint.info("a").unwrap();
    assert_eq!((info.shape.as_slice(), info.file.as_str()), (&[2, 3][..], "model.safetensors"));
    let tensor = checkpoint.tensor("a").unwrap();
    assert_eq!(tensor.dtype(), DType::BF16);
    assert_eq!(tensor.as_slice::<bf16>()[5], bf16::from_f32(6.0));
    let again = checkpoint.tensor("a").unwrap();
    assert_eq!(tensor.as_slice::<bf16>().as_ptr(), again.as_slice::<bf16>().as_ptr());
}

#[test]
fn a_tensor_outlives_the_checkpoint_it_came_from() {
    let folder = tempfile::tempdir().unwrap();
    write_shard(&folder.path().join("model.safetensors"), &["a"]);
    let tensor = Checkpoint::open(folder.path()).unwrap().tensor("a").unwrap();
    drop(folder);
    assert_eq!(tensor.as_slice::<bf16>()[0], bf16::from_f32(1.0));
}

#[test]
fn shards_are_one_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    write_shard(&folder.path().join("model-00001-of-00002.safetensors"), &["a"]);
    write_shard(&folder.path().join("model-00002-of-00002.safetensors"), &["b"]);
    write_index(
        folder.path(),
        &[("a", "model-00001-of-00002.safetensors"), ("b", "model-00002-of-00002.safetensors")],
    );
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names(), ["a", "b"]);
    assert_eq!(checkpoint.num_files(), 2);
    assert_eq!(checkpoint.info("b").unwrap().file, "model-00002-of-00002.safetensors");
}

#[test]
fn a_missing_shard_or_a_wrong_index_is_named() {
    let folder = tempfile::tempdir().unwrap();
    write_shard(&folder.path().join("one.safetensors"), &["a"]);
    write_index(folder.path(), &[("a", "one.safetensors"), ("b", "two.safetensors")]);
    assert_eq!(
        message(Checkpoint::open(folder.path())),
        "model.safetensors.index.json names the shard two.safetensors, which is missing; \
         the download is incomplete"
    );
    write_index(folder.path(), &[("a", "one.safetensors"), ("b", "one.safetensors")]);
    assert_eq!(
        message(Checkpoint::open(folder.path())),
        "model.safetensors.index.json says that one.safetensors holds b, but it does not"
    );
    write_index(folder.path(), &[("a", "../one.safetensors")]);
    assert!(message(Checkpoint::open(folder.path())).contains("is not the name of a safetensors"));
    std::fs::write(folder.path().join("model.safetensors.index.json"), "[1").unwrap();
    assert!(message(Checkpoint::open(folder.path())).contains("index.json is malformed"));
}

#[test]
fn a_folder_without_safetensors_says_what_is_there_instead() {
    let folder = tempfile::tempdir().unwrap();
    assert!(message(Checkpoint::open(folder.path())).ends_with("has no safetensors weights"));
    std::fs::write(folder.path().join("pytorch_model.bin"), "x").unwrap();
    let text = message(Checkpoint::open(folder.path()));
    assert!(text.contains("found pytorch_model.bin, which is not supported"), "{text}");
}

#[test]
fn unsupported_element_types_are_refused_when_they_are_read() {
    let header = r#"{"a":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},
        "s":{"dtype":"F32","shape":[],"data_offsets":[16,20]}}"#;
    let checkpoint = Checkpoint::from_static(raw_file(header, 20).leak(), "x").unwrap();
    let text = checkpoint.tensor("a").unwrap_err().to_string();
    assert_eq!(text, "a in x has dtype F64; supported are F32, BF16 and F16");
    let text = checkpoint.tensor("s").unwrap_err().to_string();
    assert_eq!(text, "s in x has 0 sizes; supported are one to four");
    let text = checkpoint.tensor("t").unwrap_err().to_string();
    assert_eq!(text, "the checkpoint has no tensor t");
}

#[test]
fn a_wrong_shape_gives_both_shapes_and_the_file() {
    let folder = tempfile::tempdir().unwrap();
    write_shard(&folder.path().join("model.safetensors"), &["a"]);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(checkpoint.tensor_of_shape("a", &[2, 3]).is_ok());
    assert_eq!(
        checkpoint.tensor_of_shape("a", &[3, 2]).unwrap_err().to_string(),
        "a in model.safetensors has shape [2, 3], but the model needs [3, 2]"
    );
}

#[test]
fn tensors_at_odd_addresses_are_copied() {
    // Whatever the address of the file, one of these two headers misaligns the data.
    for padding in ["", " "] {
        let header = format!(
            r#"{{"f":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},
            "h":{{"dtype":"F16","shape":[1],"data_offsets":[4,6]}}}}{padding}"#
        );
        let checkpoint = Checkpoint::from_static(raw_file(&header, 6).leak(), "x").unwrap();
        let f = checkpoint.tensor("f").unwrap().as_slice::<f32>()[0];
        let h = checkpoint.tensor("h").unwrap().as_slice::<half::f16>()[0];
        assert_eq!(f.to_bits(), u32::from_le_bytes([0, 1, 2, 3]));
        assert_eq!(h.to_bits(), u16::from_le_bytes([4, 5]));
    }
}

#[test]
fn lying_headers_are_refused() {
    let cases = [
        ("", 0),
        ("{", 0),
        ("[]", 0),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 8),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#, 12),
        (r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8),
        (r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#, 8),
        (r#"{"a":{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}}"#, 8),
    ];
    for (header, num_bytes) in cases {
        let result = Checkpoint::from_static(raw_file(header, num_bytes).leak(), "x.safetensors");
        let text = message(result);
        assert!(text.starts_with("x.safetensors is not a valid safetensors file"), "{text}");
    }
    let mut endless = raw_file("{}", 0);
    endless[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(message(Checkpoint::from_static(endless.leak(), "x")).contains("download it again"));
}

#[test]
fn an_empty_or_truncated_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write_shard(&path, &["a", "b"]);
    let whole = std::fs::read(&path).unwrap();
    for len in 0..whole.len() {
        std::fs::write(&path, &whole[..len]).unwrap();
        let text = message(Checkpoint::open(folder.path()));
        assert!(text.contains("model.safetensors"), "{text}");
    }
}

proptest::proptest! {
    #[test]
    fn a_damaged_file_never_panics(at in 0usize..200, byte: u8, second in 0usize..200) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write_shard(&path, &["a", "b"]);
        let mut bytes = std::fs::read(&path).unwrap();
        let len = bytes.len();
        bytes[at % len] = byte;
        bytes[second % len] ^= 1;
        if let Ok(checkpoint) = Checkpoint::from_static(bytes.leak(), "x") {
            for name in checkpoint.names() {
                if let Ok(tensor) = checkpoint.tensor(&name) {
                    proptest::prop_assert!(tensor.size_bytes() <= len);
                }
            }
        }
    }
}
