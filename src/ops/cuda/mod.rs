//! The CUDA backend: launch code for the kernels under `kernels/`.
//!
//! | file | what |
//! |---|---|
//! | `driver`, `image` | the real launcher, and the kernels that it loads |
//! | `launcher` | the seam: names, shapes and arguments of launches; memory; errors |
//! | `memory` | tensors on the device |
//! | `rows` | embedding, norms, rotary embedding, activations, gathers, cache writes |
//! | `attention`, `matmul`, `experts`, `sample` | the others, one file per group of kernels |
//! | `fp8` | products of FP8 by FP8, with a library |
//! | `all_reduce` | sums over several GPUs; not an operation, since it knows of other ranks |
//!
//! Activations are bf16 (f16 where a kernel says so), logits f32, sums f32. A launch depends on
//! shapes and scalars only, never on what lies in device memory, so that it can be recorded and
//! played again. Which device runs it is the launcher's business: the driver's, or in tests the
//! SIMT machine's.

pub mod all_reduce;
mod attention;
pub mod cublas;
pub mod driver;
mod experts;
mod fp8;
mod image;
mod latent;
pub mod launcher;
mod matmul;
mod memory;
mod product;
mod rows;
mod sample;
mod support;

use std::sync::Mutex;

use super::args::*;
use super::{DeviceMemoryInfo, LayerShape, Ops, OpsError, Recording, StepLimits};
use crate::formats::{PackedMatrix, dense};
use crate::output::SampledToken;
use crate::tensor::{DType, Shape, Tensor, View, ViewMut};
pub use image::{Image, KERNELS};
use launcher::{DeviceFacts, KernelArg, Launch, Launcher};
pub use matmul::DenseProducts;

/// Implements [`Ops`] with kernels that `L` launches.
pub struct CudaOps<L> {
    // Dropped before the launcher, on whose stream it computes.
    dense_products: Option<Box<dyn DenseProducts>>,
    launcher: L,
    facts: DeviceFacts,
    records: bool,
    sampler: sample::Sampler,
    partials: attention::Partials,
    product_scratch: Mutex<matmul::Scratch>,
    expert_scratch: Mutex<experts::Scratch>,
}

impl<L: Launcher> CudaOps<L> {
    /// Operations on the launcher's device.
    pub fn new(launcher: L) -> CudaOps<L> {
        CudaOps {
            facts: launcher.facts(),
            launcher,
            records: true,
            sampler: sample::Sampler::default(),
            partials: attention::Partials::default(),
            product_scratch: Mutex::default(),
            expert_scratch: Mutex::default(),
            dense_products: None,
        }
    }

    /// The same, launching every kernel of every step.
    pub fn eager(self) -> CudaOps<L> {
        CudaOps { records: false, ..self }
    }

    /// The same with a library's dense products in place of our own, where it has them.
    pub fn with_dense_products(self, library: Box<dyn DenseProducts>) -> CudaOps<L> {
        CudaOps { dense_products: Some(library), ..self }
    }

    fn dense_products(&self) -> Option<&dyn DenseProducts> {
        self.dense_products.as_deref()
    }

    /// The device.
    pub fn launcher(&self) -> &L {
        &self.launcher
    }

    /// What launch code must know of the device.
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    /// Runs a kernel unless there is nothing to do: CUDA refuses empty grids.
    fn launch(&self, kernel: &'static str, launch: Launch, args: &[KernelArg<'_>]) {
        if !launch.is_empty() {
            self.launcher.launch(kernel, launch, args);
        }
    }
}

/// The name of a kernel that exists for activations of bf16 and of f16.
macro_rules! by_activation {
    ($dtype:expr, $name:literal) => {
        match $dtype {
            $crate::tensor::DType::BF16 => concat!($name, "_bf16"),
            $crate::tensor::DType::F16 => concat!($name, "_f16"),
            other => panic!("{}: activations of {other}", $name),
        }
    };
}
use by_activation;

impl<L: Launcher> Ops for CudaOps<L> {
    fn name(&self) -> String {
        format!("cuda ({})", self.launcher.name())
    }

    fn choices(&self) -> Vec<(&'static str, String)> {
        let library = self.dense_products();
        let dense = match library {
            Some(library) => format!("{} from {} rows on", library.name(), matmul::LIBRARY_ROWS),
            None => "our own kernels: cuBLASLt was not found".to_owned(),
        };
        let codes = match fp8::is_multiplied(self.facts(), library) {
            true => format!("tensor cores from {} rows on", matmul::LIBRARY_ROWS),
            false => "widened to bf16".to_owned(),
        };
        let steps =
            if self.records { "recorded and replayed" } else { "launched kernel by kernel" };
        vec![
            ("bf16 products", dense),
            ("FP8 products", codes),
            ("decode steps", steps.to_owned()),
            ("limits", support::limits(self.facts())),
        ]
    }

    fn activation_dtype(&self) -> DType {
        DType::BF16
    }

    fn device_memory(&self) -> Result<Option<DeviceMemoryInfo>, OpsError> {
        self.named(self.launcher.memory()).map(Some)
    }

    fn set_aside(&self, bytes: usize) -> Result<(), OpsError> {
        self.named(self.launcher.set_aside(bytes))
    }

    fn zeros(&self, dtype: DType, shape: Shape) -> Result<Tensor, OpsError> {
        self.zeroed(dtype, shape)
    }

    fn zeros_kv(&self, dtype: DType, shape: Shape) -> Result<Tensor, OpsError> {
        self.zeroed(dtype, shape)
    }

    fn place(&self, tensor: Tensor) -> Result<Tensor, OpsError> {
        self.placed(tensor)
    }

    fn mirror(&self, host: &Tensor) -> Result<Option<Tensor>, OpsError> {
        self.zeroed(host.dtype(), host.shape()).map(Some)
    }

    fn upload(&self, to: ViewMut<'_>, from: View<'_>) {
        self.upload_rows(to, from);
    }

    fn download(&self, to: &mut [u8], from: View<'_>) {
        self.launcher.download(to, from);
    }

    fn runs_beside_host(&self) -> bool {
        true
    }

    fn can_record(&self) -> bool {
        self.records
    }

    fn record(&self, step: &mut dyn FnMut()) -> Option<Recording> {
        self.launcher.begin_recording();
        step();
        self.launcher.end_recording()
    }

    fn replay(&self, recording: &Recording) {
        self.launcher.replay(recording);
    }

    fn synchronize(&self) -> Result<(), OpsError> {
        self.named(self.launcher.synchronize())
    }

    fn check(&self, limits: &StepLimits, layer: &LayerShape) -> Result<(), OpsError> {
        let checked = support::check_shape(self.facts(), limits, layer);
        checked.map_err(|refusal| refusal.of_device(self.name()))
    }

    fn scratch_bytes(&self, limits: &StepLimits) -> usize {
        sample::Sampler::bytes(limits.max_logit_rows, limits.vocab_size)
            + attention::Partials::size_bytes(limits)
            + self.product_scratch_bytes(limits)
            + experts::scratch_bytes(limits)
    }

    fn reserve(&self, limits: &StepLimits) -> Result<(), OpsError> {
        let (rows, vocab_size) = (limits.max_logit_rows, limits.vocab_size);
        self.named(self.sampler.reserve(&self.launcher, rows, vocab_size))?;
        self.named(self.partials.reserve(&self.launcher, limits))?;
        self.named(self.reserve_products(limits))?;
        self.named(self.reserve_experts(limits))
    }

    fn arrange(&self, matrix: PackedMatrix) -> Result<PackedMatrix, OpsError> {
        support::check_matrix(&matrix).map_err(|refusal| refusal.of_device(self.name()))?;
        let matrix = self.with_codes_arranged(matrix);
        self.placed_matrix(dense::into_dtype(matrix, self.activation_dtype()))
    }

    fn place_heads(&self, matrices: Tensor) -> Result<Tensor, OpsError> {
        let shape = matrices.shape();
        let cols = shape.sizes()[2];
        let rows = dense::pack(matrices.reshaped([shape.len() / cols, cols]));
        let rows = dense::into_dtype(rows, self.activation_dtype());
        self.placed(rows.data.reshaped(shape))
    }

    fn index_experts(&self, experts: Vec<Expert>) -> Result<Experts, OpsError> {
        support::check_experts(&experts).map_err(|refusal| refusal.of_device(self.name()))?;
        self.indexed(experts)
    }

    fn expert_rows(&self, _: usize) -> usize {
        0
    }

    fn arranged_bytes(&self, _: DType, shape: [usize; 2]) -> usize {
        shape.iter().product::<usize>() * self.activation_dtype().size_bytes()
    }

    fn embed(&self, args: EmbedArgs<'_>) {
        args.check();
        self.embed_rows(args);
    }

    fn norm(&self, args: NormArgs<'_>) {
        args.check();
        self.norm_rows(args);
    }

    fn add_norm(&self, args: AddNormArgs<'_>) {
        args.check();
        self.add_norm_rows(args);
    }

    fn layer_norm(&self, args: LayerNormArgs<'_>) {
        args.check();
        self.layer_norm_rows(args);
    }

    fn rope(&self, args: RopeArgs<'_>) {
        args.check();
        self.rotate(args);
    }

    fn matmul(&self, args: MatmulArgs<'_>) {
        args.check();
        self.multiply(args);
    }

    fn gated_matmul(&self, args: GatedMatmulArgs<'_>) {
        args.check();
        self.multiply_gated(args);
    }

    fn multiply_codes(&self, out: ViewMut<'_>, x: View<'_>, weight: View<'_>) -> bool {
        let library = self.dense_products();
        let is_had = x.dtype() != DType::Fp8 || fp8::is_multiplied(self.facts(), library);
        is_had && library.is_some_and(|library| library.multiply(out, x, weight, None))
    }

    fn route_experts(&self, args: RouteExpertsArgs<'_>) {
        args.check();
        self.route(args);
    }

    fn expert_mlp(&self, args: ExpertMlpArgs<'_>) {
        args.check(self.expert_rows(args.x.size(0)));
        self.multiply_experts(args);
    }

    fn gated_activation(&self, args: GatedActivationArgs<'_>) {
        args.check();
        self.activate(args);
    }

    fn write_kv(&self, args: WriteKvArgs<'_>) {
        args.check();
        self.write_slots(args);
    }

    fn rope_and_write_kv(&self, args: RopeKvArgs<'_>) {
        args.check();
        self.rotate_and_write_slots(args);
    }

    fn attention(&self, args: AttentionArgs<'_>) {
        args.check();
        self.attend(args);
    }

    fn head_matmul(&self, args: HeadMatmulArgs<'_>) {
        args.check();
        self.multiply_heads(args);
    }

    fn write_latent(&self, args: WriteLatentArgs<'_>) {
        args.check();
        self.write_latents(args);
    }

    fn latent_attention(&self, args: LatentAttentionArgs<'_>) {
        args.check();
        self.attend_latents(args);
    }

    fn add(&self, args: AddArgs<'_>) {
        args.check();
        self.add_elements(args);
    }

    fn gather_rows(&self, args: GatherRowsArgs<'_>) {
        args.check();
        self.gather(args);
    }

    fn copy_blocks(&self, args: CopyBlocksArgs<'_>) {
        self.copy_cache_blocks(args);
    }

    fn soft_cap(&self, args: SoftCapArgs<'_>) {
        args.check();
        self.cap_elements(args);
    }

    fn sample(&self, args: SampleArgs<'_>) -> Vec<SampledToken> {
        args.check();
        self.sample_rows(args)
    }
}
