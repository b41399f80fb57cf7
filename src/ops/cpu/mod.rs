//! The CPU backend: kernels written once, compiled per instruction set, run on a thread pool.
//!
//! | file | what |
//! |---|---|
//! | `isa`, `topology` | which instructions, how many threads and on which cores, decided once at start-up |
//! | `peak`, `peak_x86` | how fast this machine's instructions are, for benchmarks |
//! | `simd`; `scalar`, `avx2`, `avx512` | the vector vocabulary; one file per instruction set |
//! | `pool`, `share` | fork-join threads; what they share |
//! | `kv_rows` | cached keys and values of every dtype, as kernels read and write them |
//! | `byte_simd`, `byte_vectors` | what products of bytes need beside |
//! | `weight_blocks`, `lines` | weights in blocks, and activations for them |
//! | `wide_simd`, `avx512_bf16` | codes widened to f32 and to bf16, and their products |
//! | `matmul`, `wide_matmul`, `byte_matmul`, `attention`, `rows`, `norm_lines`, `sample` | the kernels on vectors |
//! | `amx`, `tile_blocks`, `tile_codes`, `tile_groups`, `tile_write` | tiles, and the matmuls on them |
//! | `tile_attention`, `tile_cache`, `tile_pack`, `tile_pipeline`, `tile_rows`, `tile_softmax`, `tile_sums` | attention on them |
//! | `best_columns` | what greedy sampling keeps of logits |
//! | `context_parts` | how attention over parts of a context is joined |
//! | `experts` | which experts compute a token, and which tokens an expert computes |
//! | `launch`, `launch_attention`, `launch_experts`, `launch_greedy`, `launch_inputs`, `launch_latent`, `launch_matmul`, `launch_mlp`, `partition` | how operations are cut into tasks |
//!
//! Activations are f32. No result depends on the number of threads, nor on which other rows
//! or sequences are in the batch: that is part of every kernel's contract and tested bit by bit.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod best_columns;
mod byte_matmul;
mod byte_simd;
#[cfg(target_arch = "x86_64")]
mod byte_vectors;
mod context_parts;
mod experts;
mod isa;
mod kv_rows;
mod launch;
mod launch_attention;
mod launch_experts;
mod launch_greedy;
mod launch_inputs;
mod launch_latent;
mod launch_matmul;
mod launch_mlp;
mod lines;
mod matmul;
mod middle;
mod norm_lines;
mod partition;
mod peak;
#[cfg(target_arch = "x86_64")]
mod peak_x86;
pub mod pool;
mod rows;
mod sample;
mod scalar;
mod share;
mod shared_parts;
#[cfg(target_arch = "x86_64")]
mod short_codes;
#[cfg(target_arch = "x86_64")]
mod short_matmul;
mod simd;
#[cfg(target_arch = "x86_64")]
mod tile_attention;
#[cfg(target_arch = "x86_64")]
mod tile_blocks;
#[cfg(target_arch = "x86_64")]
mod tile_cache;
#[cfg(target_arch = "x86_64")]
mod tile_codes;
#[cfg(target_arch = "x86_64")]
mod tile_groups;
#[cfg(target_arch = "x86_64")]
mod tile_pack;
#[cfg(target_arch = "x86_64")]
mod tile_pipeline;
#[cfg(target_arch = "x86_64")]
mod tile_products;
#[cfg(target_arch = "x86_64")]
mod tile_rows;
#[cfg(target_arch = "x86_64")]
mod tile_softmax;
#[cfg(target_arch = "x86_64")]
mod tile_sums;
#[cfg(target_arch = "x86_64")]
mod tile_write;
mod topology;
mod weight_blocks;
mod wide_matmul;
mod wide_simd;

use std::sync::{Mutex, PoisonError};

use super::args::*;
use super::{Ops, OpsError, StepLimits};
use crate::config::CpuIsa;
use crate::formats::{PackedMatrix, dense};
use crate::output::SampledToken;
use crate::tensor::{DType, View, ViewMut};
pub use isa::Isa;
use launch_inputs::Activations;
pub use peak::{Arithmetic, peak_arithmetic};
use pool::Pool;
use share::{PerThread, Scratch};
pub use topology::physical_cores;

/// The CPU backend cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The instruction set asked for is not on this machine.
    #[error("this machine has no {wanted} instructions; it supports {supported}")]
    UnsupportedIsa {
        /// What was asked for.
        wanted: String,
        /// What there is, best first.
        supported: String,
    },
    /// Zero threads were asked for.
    #[error("at least one compute thread is needed")]
    NoThreads,
    /// The system refused a thread.
    #[error("cannot start {threads} compute threads: {source}")]
    Spawn {
        /// How many were wanted.
        threads: usize,
        /// The system's words.
        source: std::io::Error,
    },
}

/// Implements [`Ops`] on the threads of one machine.
pub struct CpuOps {
    isa: Isa,
    pool: Pool,
    scratch: PerThread<[Scratch; 2]>,
    samplers: PerThread<sample::SampleScratch>,
    prepared: Mutex<launch_inputs::Prepared>,
    attention_plan: Mutex<launch_attention::AttentionPlan>,
    experts: Mutex<launch_experts::ExpertState>,
    /// Bytes of results that the caches keep until they are read.
    kept_bytes: usize,
}

impl CpuOps {
    /// Chooses instructions and starts threads. `threads` counts the calling thread; `None`
    /// means the physical cores of this process's affinity mask.
    pub fn new(threads: Option<usize>, isa: CpuIsa) -> Result<CpuOps, CpuError> {
        let isa = Isa::choose(isa)?;
        let threads = threads.unwrap_or_else(physical_cores);
        if threads == 0 {
            return Err(CpuError::NoThreads);
        }
        let places = topology::worker_places(threads);
        tracing::debug!(threads, ?places, "compute threads start");
        let pool =
            Pool::new(threads, places).map_err(|source| CpuError::Spawn { threads, source })?;
        Ok(CpuOps {
            isa,
            pool,
            scratch: PerThread::new(threads),
            samplers: PerThread::new(threads),
            prepared: Mutex::default(),
            attention_plan: Mutex::default(),
            experts: Mutex::default(),
            kept_bytes: topology::kept_bytes(),
        })
    }

    /// The same as if the caches kept results of so many bytes until they are read. What keeps
    /// fewer writes more of them past the caches; no result depends on it.
    pub fn keeping(self, kept_bytes: usize) -> CpuOps {
        CpuOps { kept_bytes, ..self }
    }

    /// Whether the caches keep so many f32 until they are read.
    fn keeps(&self, len: usize) -> bool {
        len * size_of::<f32>() <= self.kept_bytes
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Number of compute threads, the calling one among them.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

/// Runs `$body` with `$E` naming the element type of a float dtype.
macro_rules! with_float {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $E = f32;
                $body
            }
            DType::BF16 => {
                type $E = half::bf16;
                $body
            }
            DType::F16 => {
                type $E = half::f16;
                $body
            }
            DType::U32 | DType::I8 | DType::U8 | DType::Fp8 => {
                panic!("an integer tensor where floats are needed")
            }
        }
    };
}
use with_float;

impl Ops for CpuOps {
    fn name(&self) -> String {
        let plural = if self.threads() == 1 { "" } else { "s" };
        format!("cpu ({}, {} thread{plural})", self.isa.name(), self.threads())
    }

    fn activation_dtype(&self) -> DType {
        DType::F32
    }

    fn scratch_bytes(&self, limits: &StepLimits) -> usize {
        launch_inputs::scratch_bytes(limits.max_num_tokens, limits.max_width, self.threads())
            + launch_experts::ExpertState::size_bytes(limits)
    }

    fn reserve(&self, limits: &StepLimits) -> Result<(), OpsError> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        prepared.reserve(limits.max_num_tokens, limits.max_width);
        let mut experts = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        experts.reserve(limits);
        Ok(())
    }

    fn arrange(&self, matrix: PackedMatrix) -> Result<PackedMatrix, OpsError> {
        Ok(dense::into_blocks(matrix, self.threads()))
    }

    fn arranged_bytes(&self, dtype: DType, shape: [usize; 2]) -> usize {
        match dtype {
            DType::BF16 => dense::blocks_bytes(shape),
            _ => shape.iter().product::<usize>() * dtype.size_bytes(),
        }
    }

    fn embed(&self, args: EmbedArgs<'_>) {
        args.check();
        let (out, token_ids) = (args.out.into_mut_slice(), args.token_ids.as_slice());
        if args.table.format.is_in_blocks() {
            return self.embed_from_blocks(out, token_ids, args.table);
        }
        let (table, width) = (&args.table.data, args.table.num_cols);
        with_float!(table.dtype(), E => self.copy_rows(out, table.as_slice::<E>(), token_ids, width));
    }

    fn norm(&self, args: NormArgs<'_>) {
        args.check();
        with_float!(args.weight.dtype(), W => self.norm_rows(rows::Norm {
            out: args.out.into_mut_slice(),
            x: args.x.as_slice(),
            residual: None,
            weight: args.weight.as_slice::<W>(),
            eps: args.eps,
        }));
    }

    fn add_norm(&self, args: AddNormArgs<'_>) {
        args.check();
        with_float!(args.weight.dtype(), W => self.norm_rows(rows::Norm {
            out: args.out.into_mut_slice(),
            x: args.x.as_slice(),
            residual: Some(args.residual.into_mut_slice()),
            weight: args.weight.as_slice::<W>(),
            eps: args.eps,
        }));
    }

    fn layer_norm(&self, args: LayerNormArgs<'_>) {
        args.check();
        with_float!(args.weight.dtype(), W => self.layer_norm_rows(rows::LayerNorm {
            out: args.out.into_mut_slice(),
            x: args.x.as_slice(),
            residual: args.residual.map(ViewMut::into_mut_slice),
            weight: args.weight.as_slice::<W>(),
            bias: args.bias.map(View::as_slice),
            eps: args.eps,
        }));
    }

    fn rope(&self, args: RopeArgs<'_>) {
        args.check();
        self.rotate_tokens(args);
    }

    fn matmul(&self, args: MatmulArgs<'_>) {
        args.check();
        self.multiply(args.map_x(Activations::Rows));
    }

    fn norm_matmul(&self, args: MatmulArgs<'_, NormedRows<'_>>) {
        args.check();
        self.multiply(args.map_x(Activations::Normed));
    }

    fn gated_matmul(&self, args: GatedMatmulArgs<'_>) {
        args.check();
        self.multiply_gated(args.map_x(Activations::Rows));
    }

    fn gated_mlp(&self, args: GatedMlpArgs<'_>) {
        args.check();
        self.multiply_mlp(args.map_x(Activations::Rows));
    }

    fn norm_mlp(&self, args: GatedMlpArgs<'_, NormedRows<'_>>) {
        args.check();
        self.multiply_mlp(args.map_x(Activations::Normed));
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
        let slots = args.slot_mapping.as_slice::<u32>();
        for (cache, new) in [(args.k_cache, args.k), (args.v_cache, args.v)] {
            self.write_slots(cache, new, slots);
        }
    }

    fn rope_and_write_kv(&self, args: RopeKvArgs<'_>) {
        self.rotate_and_write(args);
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
        self.add_elements(args.out.into_mut_slice(), args.x.as_slice());
    }

    fn gather_rows(&self, args: GatherRowsArgs<'_>) {
        args.check();
        let width = args.x.size(1);
        let x = args.x.as_slice::<f32>();
        self.copy_rows(args.out.into_mut_slice(), x, args.rows.as_slice(), width);
    }

    fn copy_blocks(&self, args: CopyBlocksArgs<'_>) {
        for mut cache in std::iter::once(args.k_cache).chain(args.v_cache) {
            for &(source, destination) in args.pairs {
                cache.copy_block(source, destination);
            }
        }
    }

    fn greedy(&self, args: GreedyArgs<'_>) -> Option<Vec<u32>> {
        args.check();
        self.choose_greedily(&args)
    }

    fn soft_cap(&self, args: SoftCapArgs<'_>) {
        args.check();
        self.cap_elements(args.x.into_mut_slice(), args.cap);
    }

    fn sample(&self, args: SampleArgs<'_>) -> Vec<SampledToken> {
        args.check();
        self.sample_rows(args)
    }
}
