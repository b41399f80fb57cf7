//! The compute seam: every operation a decoder needs, as one object-safe trait.
//!
//! Outputs come first, inputs next, scalars last; every argument struct checks its shapes
//! once, in `args`. Operations write into the caller's tensors and allocate nothing that
//! grows with the step. `reference` is the referee that every backend is tested against.
//! Knows nothing of models, sequences or files.

pub mod args;
pub mod cpu;
pub mod kv_tensor;
pub mod random;
pub mod reference;

use crate::formats::PackedMatrix;
use crate::output::SampledToken;
use crate::tensor::DType;
use args::*;

/// One device's implementation of the operations.
pub trait Ops: Send + Sync {
    /// Name for logs, for example `cpu (avx512, 2 threads)`.
    fn name(&self) -> String;

    /// The dtype of activations on this device.
    fn activation_dtype(&self) -> DType;

    /// Makes room for activations of up to `max_rows` rows and `max_width` columns, so that no
    /// later operation has to; backends that need none do nothing.
    fn reserve(&self, max_rows: usize, max_width: usize) {
        let _ = (max_rows, max_width);
    }

    /// Brings a matrix, at load, into the layout that this device multiplies by fastest; its
    /// values stay the same.
    fn arrange(&self, matrix: PackedMatrix) -> PackedMatrix {
        matrix
    }

    /// Bytes that a floating-point matrix of this dtype and shape takes once arranged.
    fn arranged_bytes(&self, dtype: DType, shape: [usize; 2]) -> usize {
        shape.iter().product::<usize>() * dtype.size_bytes()
    }

    /// `out[t, :] = table[token_ids[t], :]`.
    fn embed(&self, args: EmbedArgs<'_>);

    /// `out = x / rms(x) * weight`, over the last axis.
    fn norm(&self, args: NormArgs<'_>);

    /// `residual += x; out = residual / rms(residual) * weight`.
    fn add_norm(&self, args: AddNormArgs<'_>);

    /// Rotates query and key heads in place by the angles of their positions.
    fn rope(&self, args: RopeArgs<'_>);

    /// `out = x · weightᵀ (+ bias)`.
    fn matmul(&self, args: MatmulArgs<'_>);

    /// `out = activation(x · gateᵀ) * (x · upᵀ)`.
    fn gated_matmul(&self, args: GatedMatmulArgs<'_>) {
        gated_in_steps(self, args);
    }

    /// `out = activation(gate) * up`.
    fn gated_activation(&self, args: GatedActivationArgs<'_>);

    /// Stores keys and values of new tokens at their slots.
    fn write_kv(&self, args: WriteKvArgs<'_>);

    /// Causal attention of new tokens over the paged KV cache.
    fn attention(&self, args: AttentionArgs<'_>);

    /// `out[i, :] = x[rows[i], :]`.
    fn gather_rows(&self, args: GatherRowsArgs<'_>);

    /// Copies whole KV blocks (copy-on-write).
    fn copy_blocks(&self, args: CopyBlocksArgs<'_>);

    /// Chooses (or scores) one token per row of logits.
    fn sample(&self, args: SampleArgs<'_>) -> Vec<SampledToken>;
}

/// A gated matmul as a matmul of two projections into the scratch tensors, then the activation.
pub fn gated_in_steps<O: Ops + ?Sized>(ops: &O, args: GatedMatmulArgs<'_>) {
    args.check();
    let GatedMatmulArgs { out, x, gate, up, activation, scratch: [mut gate_out, mut up_out] } =
        args;
    let projections = vec![
        Projection { out: gate_out.reborrow(), weight: gate.0, bias: gate.1 },
        Projection { out: up_out.reborrow(), weight: up.0, bias: up.1 },
    ];
    ops.matmul(MatmulArgs { x, projections });
    let (gate, up) = (gate_out.as_view(), up_out.as_view());
    ops.gated_activation(GatedActivationArgs { out, gate, up, activation });
}
