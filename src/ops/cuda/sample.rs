//! Choosing and scoring tokens on the device: one upload, one kernel, one download.
//!
//! The kernel reads words of 32 bits: a record per row, then the edits of single tokens (bias,
//! bans, penalties; a token has one), the lists of allowed tokens and the bitmasks that records
//! point to. It answers with a record per row and the most likely tokens where they are wanted;
//! log-probabilities are computed from those here. Random numbers are functions of seed and
//! position and come along.
//!
//! Buffers have a fixed size. Rows that do not fit together go in several launches, which changes
//! no result: no row knows of others.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::CudaOps;
use super::launcher::{CudaError, Launch, Launcher, args, count};
use crate::ops::args::{RowTask, SampleArgs, SampleRow};
use crate::ops::random;
use crate::output::{SampledToken, TokenLogprobs};
use crate::tensor::{DType, Shape, Tensor, View, ViewMut};

/// Words of a row's record (`ROW_WORDS` in `sample.cu`).
const ROW_WORDS: usize = 16;
/// Words of an edit (`EDIT_WORDS`): token, bias, flags and how often it was generated.
const EDIT_WORDS: usize = 3;
/// Words of a row's answer (`OUT_WORDS`).
const OUT_WORDS: usize = 6;
/// Words of a likely token: its id and logit.
const TOP_WORDS: usize = 2;
/// Room for lists of a step's rows beside the longest that one row can have.
const SHARED_WORDS: usize = 1 << 20;
/// Logits that a thread reads at once.
const WIDE: usize = 4;
/// Of the kernel; a row as long as a vocabulary needs them all.
const MAX_THREADS: usize = 1024;
/// What a weight of 1 counts (`WEIGHT_ONE`).
const WEIGHT_ONE: f64 = (1u64 << 44) as f64;

const SCORE: u32 = 1;
const REPORT: u32 = 2;
const HAS_ALLOWED: u32 = 4;
const HAS_MIN_P: u32 = 8;
const HAS_BITMASK: u32 = 16;

const BANNED: u32 = 1;
const SEEN: u32 = 2;
const COUNT_SHIFT: u32 = 2;

/// Device memory of the sampler.
#[derive(Default)]
pub struct Sampler(Mutex<Option<Buffers>>);

struct Buffers {
    input: Tensor,
    output: Tensor,
}

/// Words of a buffer in which `rows` rows fit, or one row that has all that a row can have.
fn capacity(rows: usize, vocab_size: usize) -> [usize; 2] {
    let longest_lists = (EDIT_WORDS + 1) * vocab_size + vocab_size.div_ceil(32);
    let longest_top = TOP_WORDS * vocab_size;
    [
        rows * ROW_WORDS + longest_lists.max(SHARED_WORDS),
        rows * OUT_WORDS + longest_top.max(SHARED_WORDS),
    ]
}

impl Buffers {
    fn new<L: Launcher>(launcher: &L, sizes: [usize; 2]) -> Result<Buffers, CudaError> {
        let words = |len: usize| launcher.allocate(DType::U32, Shape::from([len]));
        Ok(Buffers { input: words(sizes[0])?, output: words(sizes[1])? })
    }

    fn have_room(&self, sizes: [usize; 2]) -> bool {
        self.input.shape().len() >= sizes[0] && self.output.shape().len() >= sizes[1]
    }
}

impl Sampler {
    /// Bytes that [`Sampler::reserve`] takes.
    pub fn bytes(rows: usize, vocab_size: usize) -> usize {
        capacity(rows, vocab_size).iter().sum::<usize>() * DType::U32.size_bytes()
    }

    /// Makes room for `rows` rows of logits.
    pub fn reserve<L: Launcher>(
        &self,
        launcher: &L,
        rows: usize,
        vocab_size: usize,
    ) -> Result<(), CudaError> {
        let sizes = capacity(rows, vocab_size);
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !buffers.as_ref().is_some_and(|buffers| buffers.have_room(sizes)) {
            *buffers = Some(Buffers::new(launcher, sizes)?);
        }
        Ok(())
    }
}

impl<L: Launcher> CudaOps<L> {
    /// See [`crate::ops::Ops::sample`].
    pub(super) fn sample_rows(&self, args: SampleArgs<'_>) -> Vec<SampledToken> {
        let SampleArgs { mut logits, rows } = args;
        let vocab_size = logits.size(1);
        if let Err(error) = self.sampler.reserve(&self.launcher, rows.len(), vocab_size) {
            panic!("the sampler was not given its memory at start: {error}");
        }
        let mut buffers = self.sampler.0.lock().unwrap_or_else(PoisonError::into_inner);
        let buffers = buffers.as_mut().expect("just reserved");
        let mut tokens = Vec::with_capacity(rows.len());
        while tokens.len() < rows.len() {
            let first = tokens.len();
            let batch = Batch::fitting(buffers, &rows[first..], vocab_size);
            let part = logits.reborrow().into_rows(first..first + batch.rows);
            tokens.extend(self.sample_batch(buffers, part, &batch, &rows[first..]));
        }
        tokens
    }

    fn sample_batch(
        &self,
        buffers: &mut Buffers,
        mut logits: ViewMut<'_>,
        batch: &Batch,
        rows: &[SampleRow<'_>],
    ) -> Vec<SampledToken> {
        let vocab_size = logits.size(1);
        let input = buffers.input.rows_mut(batch.words.len());
        self.launcher.upload(input, View::of(&batch.words, [batch.words.len()]).bytes());
        let threads = vocab_size.div_ceil(WIDE).next_multiple_of(32).clamp(64, MAX_THREADS);
        let shared_bytes = if batch.has_allowed { vocab_size.div_ceil(32) * 4 } else { 0 };
        let launch = Launch::new(batch.rows, threads).with_shared(shared_bytes);
        let tensors = args![&mut logits, &mut buffers.input, &mut buffers.output, vocab_size];
        self.launch("sample_f32", launch, &tensors);
        let mut answer = vec![0; batch.answer_words * 4];
        self.launcher.download(&mut answer, buffers.output.rows(batch.answer_words));
        let words: Vec<u32> =
            answer.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        (0..batch.rows).map(|i| batch.token(i, &rows[i], &words)).collect()
    }
}

/// The words of some rows, and where their answers will be.
struct Batch {
    rows: usize,
    words: Vec<u32>,
    answer_words: usize,
    /// Per row: where its most likely tokens are, and how many.
    tops: Vec<(usize, usize)>,
    has_allowed: bool,
}

impl Batch {
    /// As many rows as there is room for, at least one.
    fn fitting(buffers: &Buffers, rows: &[SampleRow<'_>], vocab_size: usize) -> Batch {
        let room = [buffers.input.shape().len(), buffers.output.shape().len()];
        let lists: Vec<Lists> = rows.iter().map(|row| Lists::of(row, vocab_size)).collect();
        let mut sizes = [0, 0];
        let fitting = lists.iter().take_while(|lists| {
            sizes[0] += ROW_WORDS + lists.words();
            sizes[1] += OUT_WORDS + TOP_WORDS * lists.num_top.unwrap_or(0);
            sizes[0] <= room[0] && sizes[1] <= room[1]
        });
        let num_rows = fitting.count().max(1);
        let mut batch = Batch {
            rows: num_rows,
            words: vec![0; num_rows * ROW_WORDS],
            answer_words: num_rows * OUT_WORDS,
            tops: Vec::with_capacity(num_rows),
            has_allowed: false,
        };
        for (i, (row, lists)) in rows.iter().zip(&lists).take(num_rows).enumerate() {
            batch.add(i, row, lists);
        }
        batch
    }

    fn add(&mut self, i: usize, row: &SampleRow<'_>, lists: &Lists) {
        let params = row.params;
        let num_top = lists.num_top.unwrap_or(0);
        let mut flags = if lists.num_top.is_some() { REPORT } else { 0 };
        let mut token_id = 0;
        if let RowTask::Score { token_id: scored } = row.task {
            (flags, token_id) = (flags | SCORE, scored);
        }
        flags |= if lists.allowed.is_some() { HAS_ALLOWED } else { 0 };
        flags |= if lists.bitmask.is_empty() { 0 } else { HAS_BITMASK };
        flags |= if params.min_p > 0.0 { HAS_MIN_P } else { 0 };
        let allowed = lists.allowed.as_deref().unwrap_or(&[]);
        let first_edit = self.words.len();
        let first_allowed = first_edit + EDIT_WORDS * lists.edits.len();
        let record = [
            flags,
            token_id,
            params.temperature.to_bits(),
            params.top_k,
            params.top_p.to_bits(),
            params.min_p.ln().to_bits(),
            params.repetition_penalty.to_bits(),
            params.frequency_penalty.to_bits(),
            params.presence_penalty.to_bits(),
            random::uniform(row.seed, row.position).to_bits(),
            count(num_top),
            count(first_edit),
            count(lists.edits.len()),
            count(first_allowed),
            count(allowed.len()),
            count(self.answer_words),
        ];
        self.words[i * ROW_WORDS..(i + 1) * ROW_WORDS].copy_from_slice(&record);
        for (id, edit) in &lists.edits {
            let flags = edit.flags | edit.count << COUNT_SHIFT;
            self.words.extend([*id, edit.bias.to_bits(), flags]);
        }
        self.words.extend(allowed);
        self.words.extend(&lists.bitmask);
        self.tops.push((self.answer_words, num_top));
        self.answer_words += TOP_WORDS * num_top;
        self.has_allowed |= flags & (HAS_ALLOWED | HAS_BITMASK) != 0;
    }

    /// What the answer says of a row.
    fn token(&self, i: usize, row: &SampleRow<'_>, answer: &[u32]) -> SampledToken {
        let [token_id, rank, chosen, max, low, high] =
            *answer[i * OUT_WORDS..].first_chunk().expect("an answer per row");
        let max = f32::from_bits(max);
        let total = (u64::from(low) | u64::from(high) << 32) as f64 / WEIGHT_ONE;
        let logprob = |logit: f32| {
            // Equal infinities leave no NaN behind.
            let below = if logit == max { 0.0 } else { f64::from(logit) - f64::from(max) };
            (below - total.ln()) as f32
        };
        let (first, count) = self.tops[i];
        let pairs = answer[first..first + TOP_WORDS * count].as_chunks::<TOP_WORDS>().0;
        let mut top: Vec<(u32, f32)> =
            pairs.iter().map(|&[id, logit]| (id, f32::from_bits(logit))).collect();
        top.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        top.iter_mut().for_each(|(_, x)| *x = logprob(*x));
        let reported = num_top(row).is_some();
        let logprobs = || TokenLogprobs { logprob: logprob(f32::from_bits(chosen)), rank, top };
        SampledToken { token_id, logprobs: reported.then(logprobs) }
    }
}

/// How many alternatives a row wants beside the log-probability of its token.
fn num_top(row: &SampleRow<'_>) -> Option<u32> {
    match row.task {
        RowTask::Score { .. } => Some(row.params.prompt_logprobs.unwrap_or(0)),
        RowTask::Sample => row.params.logprobs,
    }
}

/// Changes to one token's logit.
#[derive(Clone, Copy, Default)]
struct Edit {
    bias: f32,
    flags: u32,
    count: u32,
}

/// What a row brings beside its record.
struct Lists {
    num_top: Option<usize>,
    /// A token has one at most.
    edits: Vec<(u32, Edit)>,
    allowed: Option<Vec<u32>>,
    /// A bit per token; empty without a bitmask.
    bitmask: Vec<u32>,
}

impl Lists {
    fn of(row: &SampleRow<'_>, vocab_size: usize) -> Lists {
        let num_top = num_top(row).map(|num_top| vocab_size.min(num_top as usize));
        if matches!(row.task, RowTask::Score { .. }) {
            let (edits, bitmask) = (Vec::new(), Vec::new());
            return Lists { num_top, edits, allowed: None, bitmask };
        }
        let exists = |id: u32| (id as usize) < vocab_size;
        // The few that the request names, then the many that it has had.
        let mut named: BTreeMap<u32, Edit> = BTreeMap::new();
        for &id in row.banned_token_ids.iter().filter(|id| exists(**id)) {
            named.entry(id).or_default().flags |= BANNED;
        }
        for &(id, bias) in row.params.logit_bias.iter().filter(|(id, _)| exists(*id)) {
            named.entry(id).or_default().bias += bias;
        }
        let mut edits = Vec::with_capacity(named.len() + row.seen.len());
        for token in row.seen.iter().filter(|token| exists(token.token_id)) {
            let mut edit = named.remove(&token.token_id).unwrap_or_default();
            edit.flags |= SEEN;
            edit.count = token.times_generated;
            edits.push((token.token_id, edit));
        }
        edits.extend(named);
        let allowed = row.params.allowed_token_ids.as_ref();
        let allowed = allowed.map(|ids| {
            let mut ids: Vec<u32> = ids.iter().copied().filter(|&id| exists(id)).collect();
            ids.sort_unstable();
            ids.dedup();
            ids
        });
        let bitmask = row.bitmask.map(|bitmask| bitmask.words(vocab_size).collect());
        Lists { num_top, edits, allowed, bitmask: bitmask.unwrap_or_default() }
    }

    fn words(&self) -> usize {
        let allowed = self.allowed.as_ref().map_or(0, Vec::len);
        EDIT_WORDS * self.edits.len() + allowed + self.bitmask.len()
    }
}
