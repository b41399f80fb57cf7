//! Where the bytes of a GPU go.

use crate::served::{count, questions};
use crate::stub::Setup;

const MIB: usize = 1 << 20;

/// Bytes of all allocations of a trace that were not freed.
fn taken(trace: &[String]) -> Vec<usize> {
    let mut taken: Vec<usize> = Vec::new();
    for line in trace {
        match line.split_once(' ') {
            Some(("alloc", bytes)) => taken.push(bytes.parse().unwrap()),
            Some(("free", bytes)) => {
                let bytes: usize = bytes.parse().unwrap();
                let place = taken.iter().position(|&taken| taken == bytes).unwrap();
                taken.remove(place);
            }
            _ => {}
        }
    }
    taken
}

#[test]
fn memory_is_taken_in_few_pieces_at_start_and_none_is_taken_by_steps() {
    for quantization in ["", "--quantization int4"] {
        let server = Setup::new(&format!("--device cuda {quantization}")).start();
        let at_start = server.trace();
        let pieces = taken(&at_start);
        assert!(pieces.len() <= 2, "weights, and everything else: {pieces:?}");
        server.texts(&questions());
        let trace = server.trace();
        assert!(trace.len() > at_start.len(), "steps were computed");
        assert_eq!(count(&trace, "alloc "), count(&at_start, "alloc "));
    }
}

#[test]
fn the_plan_is_kept_on_a_gpu_that_it_fills() {
    // The cache gets all that is left of 90 %, which is less than all sequences could use.
    let total = 150 * MIB;
    let flags = "--device cuda --enforce-eager --max-num-seqs 64 --max-model-len 1024";
    let server = Setup::of_any_size(flags).with("STUB_CUDA_MEMORY", &total).start();
    let pieces = taken(&server.trace());
    let used: usize = pieces.iter().map(|bytes| bytes.next_multiple_of(2 * MIB)).sum();
    let allowed = total / 10 * 9;
    assert!(used <= allowed, "{used} of {allowed} bytes: {pieces:?}");
    assert!(used + 32 * MIB > allowed, "{used} of {allowed} bytes: {pieces:?}");
}

#[test]
fn a_gpu_without_room_for_the_weights_is_one_error_that_says_what_to_do() {
    let error = Setup::new("--device cuda").with("STUB_CUDA_MEMORY", &(64 * MIB)).failure();
    assert!(error.contains("do not fit into the"), "{error}");
    assert!(error.contains("quantize the weights (--quantization)"), "{error}");
}

#[test]
fn memory_that_somebody_else_takes_meanwhile_is_one_error_that_says_what_to_do() {
    let setup = Setup::new("--device cuda").with("STUB_CUDA_MEMORY", &(1024 * MIB));
    let error = setup.with("STUB_CUDA_HIDDEN", &(1020 * MIB)).failure();
    assert!(error.contains("end what else is using it, or lower --gpu-memory-utilization"));
    assert!(error.contains("has no room for") && error.contains("out of memory"), "{error}");
}
