//! Operations that are recorded and replayed, on the SIMT machine.

use half::bf16;
use tokenmill::ops::Ops;
use tokenmill::ops::args::NormArgs;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::ops::cuda::launcher::Launcher;
use tokenmill::tensor::{DType, Tensor};

use crate::shim::Shim;

const SHAPE: [usize; 2] = [3, 64];

/// A norm of tensors on the device.
struct Norm {
    ops: CudaOps<Shim>,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
}

impl Norm {
    fn new() -> Norm {
        let ops = CudaOps::new(Shim::new());
        let zeros = || ops.zeros(DType::BF16, SHAPE.into()).unwrap();
        let (x, out) = (zeros(), zeros());
        let weight = ops.place(Tensor::from_slice(&[2.0f32; 64], [64])).unwrap();
        Norm { ops, x, weight, out }
    }

    fn run(&mut self) {
        let (out, x, weight) = (self.out.view_mut(), self.x.view(), self.weight.view());
        self.ops.norm(NormArgs { out, x, weight, eps: 0.0 });
    }

    /// Fills the input with a number, whose norm is 2 with its sign.
    fn fill(&mut self, value: f32) {
        let values = Tensor::from_slice(&[bf16::from_f32(value); 192], SHAPE);
        self.ops.upload(self.x.view_mut(), values.view());
    }

    fn first(&self) -> f32 {
        let mut bytes = vec![0; self.out.size_bytes()];
        self.ops.download(&mut bytes, self.out.view());
        self.ops.synchronize().unwrap();
        bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }
}

#[test]
fn a_recorded_operation_computes_on_what_lies_in_its_tensors_when_it_is_replayed() {
    let mut norm = Norm::new();
    norm.fill(3.0);
    let ops = norm.ops.launcher().name();
    norm.ops.launcher().begin_recording();
    norm.run();
    let recording = norm.ops.launcher().end_recording().expect(&ops);
    assert_eq!(norm.first(), 0.0, "nothing has run yet");
    norm.ops.replay(&recording);
    assert_eq!(norm.first(), 2.0);
    norm.fill(-5.0);
    norm.ops.replay(&recording);
    assert_eq!(norm.first(), -2.0);
}

#[test]
fn what_the_host_reads_or_writes_cannot_be_recorded() {
    let ops = CudaOps::new(Shim::new());
    let mut to = ops.zeros(DType::U32, [2].into()).unwrap();
    let from = Tensor::from_slice(&[1u32, 2], [2]);
    let recording = ops.record(&mut || ops.upload(to.view_mut(), from.view()));
    assert!(recording.is_none());
    let error = ops.synchronize().unwrap_err().to_string();
    assert!(error.contains("a copy between host and device cannot be recorded"), "{error}");
}
