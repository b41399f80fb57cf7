//! All-reduce: ranks are threads of the host, each with a machine of its own.
//!
//! Nothing holds the ranks together but the kernel: a rank goes through all of its rounds by
//! itself, is held up at random, and may be a round ahead of others. Sums are compared bit by bit
//! with those that the host adds, in the order of ranks.

use std::sync::{Mutex, PoisonError};

use tokenmill::ops::cuda::all_reduce::{Exchange, Group};
use tokenmill::ops::cuda::launcher::Launcher;
use tokenmill::tensor::{DType, Shape, Tensor, View};

use crate::shim::{self, Shim};
use crate::support::*;

const WORLDS: [usize; 3] = [2, 4, 8];
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];
/// Bytes that one block takes at a time.
const BLOCK_BYTES: usize = 512 * 16;
/// Bytes that a launch takes at a time, of as many blocks as there are.
const LAUNCH_BYTES: usize = 32 * BLOCK_BYTES;

/// The machines of the ranks serve one replica at a time.
static MACHINES: Mutex<()> = Mutex::new(());

pub fn check() {
    let rounds = if wants_few_cases() { 8 } else { 60 };
    for world in WORLDS {
        // Orders of fibers differ between ranks where a launch has one block: more would have to
        // run at the same time, and here they run one after the other.
        let ranks = Ranks::new(world, BLOCK_BYTES / 2, true);
        ranks.each(|rank| few_elements(rank, rounds));
        let ranks = Ranks::new(world, LAUNCH_BYTES + BLOCK_BYTES, false);
        ranks.each(|rank| many_elements(rank, rounds / 4));
        let ranks = Ranks::new(world, BLOCK_BYTES, true);
        ranks.each(|rank| recorded(rank, rounds / 4));
    }
}

/// Everything that one rank has.
struct Rank {
    shim: Shim,
    group: Group,
}

struct Ranks(Vec<Rank>);

impl Ranks {
    fn new(world: usize, capacity_bytes: usize, orders_differ: bool) -> Ranks {
        let seed = shim::seed();
        let seed_of = |rank: usize| seed + if orders_differ { rank as u64 * 7919 } else { 0 };
        let shims: Vec<Shim> = (0..world).map(|rank| Shim::of_rank(rank, seed_of(rank))).collect();
        let exchanges: Vec<_> =
            shims.iter().map(|shim| Exchange::new(shim, capacity_bytes).unwrap()).collect();
        let rank = |(rank, shim): (usize, Shim)| {
            let group = Group::new(&shim, rank, exchanges.clone()).unwrap();
            Rank { shim, group }
        };
        Ranks(shims.into_iter().enumerate().map(rank).collect())
    }

    /// Runs all ranks at the same time.
    fn each(&self, run: impl Fn(&Rank) + Sync) {
        let _mine = MACHINES.lock().unwrap_or_else(PoisonError::into_inner);
        let run = &run;
        std::thread::scope(|scope| {
            for rank in &self.0 {
                scope.spawn(move || run(rank));
            }
        });
    }
}

/// What rank `rank` brings to a round: numbers of different sizes, so that an order of additions
/// shows, and sums that f16 does not have.
fn brought(rank: usize, round: usize, dtype: DType, len: usize) -> Tensor {
    let rng = &mut Rng::new((round * 8 + rank) as u64 + 1);
    let number = |rng: &mut Rng| match rng.below(64) {
        0 => -0.0,
        1 => 50_000.0 * rng.float(),
        scale => rng.float() * 2f32.powi(scale as i32 % 12),
    };
    let numbers: Vec<f32> = (0..len).map(|_| number(rng)).collect();
    cast(&numbers, dtype, [len])
}

/// The bytes that every rank has to get.
fn sums(world: usize, round: usize, dtype: DType, len: usize) -> Vec<u8> {
    let mut sums = widened(&brought(0, round, dtype, len));
    for rank in 1..world {
        let more = widened(&brought(rank, round, dtype, len));
        sums.iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
    }
    cast(&sums, dtype, [len]).bytes().to_vec()
}

/// Lets other ranks go first, a different number of times in every round.
fn hold_up(rank: &Rank, round: usize) {
    let rng = &mut Rng::new((round * 8 + rank.group.rank()) as u64 + 1000);
    let times = if rng.below(4) == 0 { rng.below(300) } else { 0 };
    (0..times).for_each(|_| std::thread::yield_now());
}

/// Adds `len` elements that start `offset` elements behind an aligned address.
fn add(rank: &Rank, round: usize, dtype: DType, len: usize, offset: usize) {
    let Rank { shim, group } = rank;
    let mut data = shim.allocate(dtype, Shape::from([offset + len])).unwrap();
    let poison = vec![0xff; offset * dtype.size_bytes()];
    let mine = brought(group.rank(), round, dtype, len);
    shim.upload(data.view_mut(), &[&poison, mine.bytes()].concat());
    hold_up(rank, round);
    group.all_reduce(shim, data.view_mut().into_rows(offset..offset + len));
    let what = format!("{len} of {dtype}, rank {} of {}", group.rank(), group.world());
    shim.synchronize().unwrap_or_else(|error| panic!("{what}: {error}"));
    let expected = [poison, sums(group.world(), round, dtype, len)].concat();
    assert_bytes(rank, &format!("{what}, round {round}"), data.view(), &expected);
}

fn assert_bytes(rank: &Rank, what: &str, data: View<'_>, expected: &[u8]) {
    let mut bytes = vec![0; data.size_bytes()];
    rank.shim.download(&mut bytes, data);
    let differs = bytes.iter().zip(expected).position(|(got, want)| got != want);
    assert_eq!(differs, None, "{what}, {}: first byte that differs", rank.shim.name());
}

/// Around vectors, and more than fits into a round.
fn few_elements(rank: &Rank, rounds: usize) {
    const LENS: [usize; 8] = [1, 3, 8, 9, 511, 1000, 2048, 2049];
    for round in 0..rounds {
        let rng = &mut Rng::new(round as u64 + 50);
        let (len, offset) = (LENS[rng.below(LENS.len())], rng.below(3) % 2);
        add(rank, round, DTYPES[round % 3], len, offset);
    }
}

/// Several blocks, in turns with one, and more than all of them take at a time.
fn many_elements(rank: &Rank, rounds: usize) {
    for round in 0..rounds {
        let dtype = DTYPES[round % 3];
        let bytes = match round % 4 {
            0 => 3 * BLOCK_BYTES,
            1 => BLOCK_BYTES / 2,
            2 => LAUNCH_BYTES + BLOCK_BYTES / 4,
            _ => 2 * BLOCK_BYTES + 36,
        };
        add(rank, round, dtype, bytes / dtype.size_bytes(), 0);
    }
}

/// A launch that was recorded counts its rounds like others, also between them.
fn recorded(rank: &Rank, rounds: usize) {
    let Rank { shim, group } = rank;
    let len = 700;
    let mut data = shim.allocate(DType::BF16, Shape::from([len])).unwrap();
    shim.begin_recording();
    group.all_reduce(shim, data.view_mut());
    let recording = shim.end_recording().unwrap();
    for round in 0..rounds {
        if round % 3 == 2 {
            add(rank, round, DType::F32, 100, 0);
            continue;
        }
        let mine = brought(group.rank(), round, DType::BF16, len);
        shim.upload(data.view_mut(), mine.bytes());
        hold_up(rank, round);
        shim.replay(&recording);
        let expected = sums(group.world(), round, DType::BF16, len);
        assert_bytes(rank, &format!("replay {round}"), data.view(), &expected);
    }
}

#[test]
fn a_group_that_has_no_kernels_is_refused() {
    let shim = Shim::new();
    let exchange = |bytes| Exchange::new(&shim, bytes).unwrap();
    let refused = |rank, exchanges| Group::new(&shim, rank, exchanges).err().unwrap().to_string();
    assert_eq!(
        refused(1, vec![exchange(64), exchange(64), exchange(64)]),
        "rank 1 of 3: all-reduce has kernels for 2, 4 and 8 ranks"
    );
    assert_eq!(
        refused(2, vec![exchange(64), exchange(64)]),
        "rank 2 of 2: ranks are numbers below that of exchanges"
    );
    assert_eq!(
        refused(0, vec![exchange(64), exchange(4096)]),
        "rank 0 of 2: exchanges have to have the same capacity"
    );
}
