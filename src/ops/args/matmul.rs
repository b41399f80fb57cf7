//! Arguments of products with matrices.

use super::{Activation, AddNormArgs, LayerNormArgs, NormArgs};
use crate::formats::PackedMatrix;
use crate::ops::Ops;
use crate::tensor::{View, ViewMut};

/// Rows that a matrix multiplies: a [`View`] of them as they are, or [`NormedRows`].
pub trait RowOperand {
    /// Number of rows.
    fn num_rows(&self) -> usize;

    /// Elements of a row.
    fn width(&self) -> usize;

    /// Panics unless the shapes of what they are made of agree.
    fn check(&self) {}
}

impl RowOperand for View<'_> {
    fn num_rows(&self) -> usize {
        self.size(0)
    }

    fn width(&self) -> usize {
        self.size(1)
    }
}

/// Rows that are normed before a matrix multiplies them. Where a backend does both at once,
/// `out` holds anything afterwards.
pub enum NormedRows<'a> {
    /// See [`Ops::norm`].
    Norm(NormArgs<'a>),
    /// See [`Ops::add_norm`].
    AddNorm(AddNormArgs<'a>),
    /// See [`Ops::layer_norm`]; apart, because it is by far the largest.
    LayerNorm(Box<LayerNormArgs<'a>>),
}

impl<'a> NormedRows<'a> {
    /// Runs the norm by itself.
    pub fn run<O: Ops + ?Sized>(self, ops: &O) -> View<'a> {
        match self {
            NormedRows::Norm(NormArgs { mut out, x, weight, eps }) => {
                ops.norm(NormArgs { out: out.reborrow(), x, weight, eps });
                out.into_view()
            }
            NormedRows::AddNorm(AddNormArgs { mut out, residual, x, weight, eps }) => {
                ops.add_norm(AddNormArgs { out: out.reborrow(), residual, x, weight, eps });
                out.into_view()
            }
            NormedRows::LayerNorm(norm) => {
                let LayerNormArgs { mut out, residual, x, weight, bias, eps } = *norm;
                let to = out.reborrow();
                ops.layer_norm(LayerNormArgs { out: to, residual, x, weight, bias, eps });
                out.into_view()
            }
        }
    }

    fn x(&self) -> View<'a> {
        match self {
            NormedRows::Norm(norm) => norm.x,
            NormedRows::AddNorm(norm) => norm.x,
            NormedRows::LayerNorm(norm) => norm.x,
        }
    }
}

impl RowOperand for NormedRows<'_> {
    fn num_rows(&self) -> usize {
        self.x().size(0)
    }

    fn width(&self) -> usize {
        self.x().size(1)
    }

    fn check(&self) {
        match self {
            NormedRows::Norm(norm) => norm.check(),
            NormedRows::AddNorm(norm) => norm.check(),
            NormedRows::LayerNorm(norm) => norm.check(),
        }
    }
}

/// See [`Ops::matmul`] and [`Ops::norm_matmul`]: products of the same activations with one or more
/// matrices.
pub struct MatmulArgs<'a, X = View<'a>> {
    /// `[num_rows, in_features]`.
    pub x: X,
    /// What to multiply by.
    pub projections: Vec<Projection<'a>>,
}

/// One product of a [`MatmulArgs`].
pub struct Projection<'a> {
    /// `[num_rows, weight.num_rows]`.
    pub out: ViewMut<'a>,
    /// `[out_features, in_features]` in any format.
    pub weight: &'a PackedMatrix,
    /// `[out_features]`, any float dtype.
    pub bias: Option<View<'a>>,
}

impl<'a, X> MatmulArgs<'a, X> {
    /// The same products with what becomes of the activations.
    pub fn map_x<Y>(self, become_y: impl FnOnce(X) -> Y) -> MatmulArgs<'a, Y> {
        MatmulArgs { x: become_y(self.x), projections: self.projections }
    }
}

impl<X: RowOperand> MatmulArgs<'_, X> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        self.x.check();
        for projection in &self.projections {
            let Projection { out, weight, bias } = projection;
            assert_eq!(out.size(0), self.x.num_rows(), "matmul: rows");
            assert_eq!(out.size(1), weight.num_rows, "matmul: out features");
            assert_eq!(self.x.width(), weight.num_cols, "matmul: in features");
            if let Some(bias) = bias {
                assert_eq!(bias.shape().sizes(), &[weight.num_rows], "matmul: bias");
            }
        }
    }
}

/// A matrix and the bias that is added to products with it.
pub type WeightAndBias<'a> = (&'a PackedMatrix, Option<View<'a>>);

/// See [`Ops::gated_matmul`].
pub struct GatedMatmulArgs<'a, X = View<'a>> {
    /// `[num_rows, intermediate_size]`.
    pub out: ViewMut<'a>,
    /// `[num_rows, in_features]`.
    pub x: X,
    /// `[intermediate_size, in_features]`; its product goes through the activation.
    pub gate: WeightAndBias<'a>,
    /// As `gate`; its product is multiplied by.
    pub up: WeightAndBias<'a>,
    /// Applied to the gate's product.
    pub activation: Activation,
    /// Two tensors as `out`, for backends that compute the products one by one.
    pub scratch: [ViewMut<'a>; 2],
}

impl<'a, X> GatedMatmulArgs<'a, X> {
    /// The same product with what becomes of the activations.
    pub fn map_x<Y>(self, become_y: impl FnOnce(X) -> Y) -> GatedMatmulArgs<'a, Y> {
        let GatedMatmulArgs { out, x, gate, up, activation, scratch } = self;
        GatedMatmulArgs { out, x: become_y(x), gate, up, activation, scratch }
    }
}

impl<X: RowOperand> GatedMatmulArgs<'_, X> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        self.x.check();
        assert_eq!(self.out.size(0), self.x.num_rows(), "gated_matmul: rows");
        for (weight, bias) in [&self.gate, &self.up] {
            assert_eq!(self.out.size(1), weight.num_rows, "gated_matmul: out features");
            assert_eq!(self.x.width(), weight.num_cols, "gated_matmul: in features");
            if let Some(bias) = bias {
                assert_eq!(bias.shape().sizes(), &[weight.num_rows], "gated_matmul: bias");
            }
        }
        for scratch in &self.scratch {
            assert_eq!(scratch.shape(), self.out.shape(), "gated_matmul: scratch");
        }
    }
}

/// See [`Ops::gated_mlp`] and [`Ops::norm_mlp`].
pub struct GatedMlpArgs<'a, X = View<'a>> {
    /// The gated product; `out` holds it meanwhile, in any layout, and anything afterwards.
    pub gated: GatedMatmulArgs<'a, X>,
    /// What the gated product is multiplied by, and where the result goes.
    pub down: Projection<'a>,
}

impl<'a, X> GatedMlpArgs<'a, X> {
    /// The same MLP of what becomes of the activations.
    pub fn map_x<Y>(self, become_y: impl FnOnce(X) -> Y) -> GatedMlpArgs<'a, Y> {
        GatedMlpArgs { gated: self.gated.map_x(become_y), down: self.down }
    }
}

impl<X: RowOperand> GatedMlpArgs<'_, X> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        self.gated.check();
        assert_eq!(self.down.out.size(0), self.gated.out.size(0), "gated_mlp: rows");
        assert_eq!(self.down.out.size(1), self.down.weight.num_rows, "gated_mlp: out features");
        assert_eq!(self.down.weight.num_cols, self.gated.out.size(1), "gated_mlp: intermediate");
    }
}
