//! From traces to figures: spreads of times, tokens per second.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::load::{Outcome, RequestTrace};

/// How a measured quantity spreads. Percentiles interpolate between readings, as numpy does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// Smallest: on a machine with neighbours, what an undisturbed moment allows. Missing in
    /// records of earlier versions.
    #[serde(default)]
    pub min: Option<f64>,
}

impl Spread {
    /// `None` without readings.
    pub fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        Some(Spread {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(&values, 0.50),
            p90: percentile(&values, 0.90),
            p99: percentile(&values, 0.99),
            max,
            min: values.first().copied(),
        })
    }
}

/// The value below which a fraction of `sorted` lies; `sorted` is not empty.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let place = fraction * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// The middle of the readings; `None` without any.
pub(super) fn median(values: Vec<f64>) -> Option<f64> {
    Spread::of(values).map(|spread| spread.p50)
}

/// Milliseconds.
pub(super) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl RequestTrace {
    /// From sending to the first piece of output.
    pub fn time_to_first_token(&self) -> Option<Duration> {
        self.arrivals.first().map(|first| first.duration_since(self.sent))
    }

    /// Gaps between pieces of output. With a piece per token these are inter-token latencies.
    pub fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.arrivals.windows(2).map(|pair| pair[1].duration_since(pair[0]))
    }

    /// Mean time per token after the first one.
    fn time_per_output_token(&self) -> Option<Duration> {
        let (first, last) = (self.arrivals.first()?, self.arrivals.last()?);
        let rest = u32::try_from(self.num_output_tokens).ok()?.checked_sub(1)?;
        last.duration_since(*first).checked_div(rest)
    }
}

/// What a load of many requests came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LoadFigures {
    /// Requests that finished.
    pub completed: usize,
    /// Requests that did not.
    pub failed: usize,
    /// From the first request sent to the last one ended.
    pub duration_s: f64,
    /// Prompt tokens of all finished requests.
    pub total_input_tokens: usize,
    /// Prompt tokens that a prefix cache held, as far as the engine says.
    pub total_cached_tokens: usize,
    /// Generated tokens of all finished requests.
    pub total_output_tokens: usize,
    /// Finished requests per second.
    pub requests_per_s: f64,
    /// Generated tokens per second.
    pub output_tokens_per_s: f64,
    /// Prompt and generated tokens per second.
    pub total_tokens_per_s: f64,
    /// Time to the first token, in milliseconds.
    pub ttft_ms: Option<Spread>,
    /// Mean time per token after the first, one reading per request.
    pub tpot_ms: Option<Spread>,
    /// Gaps between pieces of output; a piece is one token unless the server sends fewer.
    pub itl_ms: Option<Spread>,
    /// From sending to the end of the answer.
    pub e2e_ms: Option<Spread>,
}

impl LoadFigures {
    /// Figures of a load.
    pub fn of(outcome: &Outcome) -> LoadFigures {
        let traces = &outcome.traces;
        let total = |count: fn(&RequestTrace) -> usize| traces.iter().map(count).sum::<usize>();
        let duration_s = outcome.duration.as_secs_f64();
        let total_input_tokens = total(|trace| trace.num_input_tokens);
        let total_output_tokens = total(|trace| trace.num_output_tokens);
        let times = |time: fn(&RequestTrace) -> Option<Duration>| {
            Spread::of(traces.iter().filter_map(time).map(ms).collect())
        };
        LoadFigures {
            completed: traces.len(),
            failed: outcome.failures.len(),
            duration_s,
            total_input_tokens,
            total_cached_tokens: total(|trace| trace.num_cached_tokens),
            total_output_tokens,
            requests_per_s: traces.len() as f64 / duration_s,
            output_tokens_per_s: total_output_tokens as f64 / duration_s,
            total_tokens_per_s: (total_input_tokens + total_output_tokens) as f64 / duration_s,
            ttft_ms: times(RequestTrace::time_to_first_token),
            tpot_ms: times(RequestTrace::time_per_output_token),
            itl_ms: Spread::of(traces.iter().flat_map(RequestTrace::gaps).map(ms).collect()),
            e2e_ms: times(|trace| Some(trace.ended.duration_since(trace.sent))),
        }
    }

    /// The figures for people.
    pub fn print(&self) {
        let LoadFigures { completed, failed, duration_s, .. } = self;
        println!("{completed} requests in {duration_s:.2} s, {failed} failed");
        println!(
            "tokens: {} in ({} of them cached), {} out",
            self.total_input_tokens, self.total_cached_tokens, self.total_output_tokens
        );
        println!(
            "per second: {:.2} requests, {:.1} output tokens, {:.1} tokens in all",
            self.requests_per_s, self.output_tokens_per_s, self.total_tokens_per_s
        );
        print_spreads(&[
            ("time to first token", self.ttft_ms),
            ("time per output token", self.tpot_ms),
            ("inter-token latency", self.itl_ms),
            ("end to end", self.e2e_ms),
        ]);
    }
}

/// A table of times in milliseconds; what was not measured is left out.
pub(super) fn print_spreads(rows: &[(&str, Option<Spread>)]) {
    print!("{:<22} {:>9} {:>9} {:>9}", "ms", "min", "mean", "p50");
    println!(" {:>9} {:>9} {:>9}", "p90", "p99", "max");
    for (name, spread) in rows {
        if let Some(Spread { mean, p50, p90, p99, max, min }) = spread {
            print!("{name:<22} {:>9.2} {mean:>9.2} {p50:>9.2}", min.unwrap_or(f64::NAN));
            println!(" {p90:>9.2} {p99:>9.2} {max:>9.2}");
        }
    }
}

/// One batch of requests that were sent together, apart into its prefill and its decode steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct BatchFigures {
    /// From the first request sent to the last one ended.
    pub latency_s: f64,
    /// From the first request sent until every request has its first token.
    pub prefill_s: f64,
    /// Prompt tokens per second of that time.
    pub prefill_tokens_per_s: f64,
    /// Generated tokens per second after that time.
    pub decode_tokens_per_s: Option<f64>,
    /// Steps per second after that time.
    pub decode_steps_per_s: Option<f64>,
}

impl BatchFigures {
    /// `None` unless every request yielded a token.
    pub fn of(traces: &[RequestTrace]) -> Option<BatchFigures> {
        let sent = traces.iter().map(|trace| trace.sent).min()?;
        let firsts: Option<Vec<Instant>> =
            traces.iter().map(|trace| trace.arrivals.first().copied()).collect();
        let prefilled = firsts?.into_iter().max()?;
        let last = traces.iter().filter_map(|trace| trace.arrivals.last().copied()).max()?;
        let ended = traces.iter().map(|trace| trace.ended).max()?;
        let num_input_tokens: usize = traces.iter().map(|trace| trace.num_input_tokens).sum();
        let prefill_s = prefilled.duration_since(sent).as_secs_f64();
        // The engine sends one piece per step, so later pieces count steps and tokens.
        let later = |trace: &RequestTrace| {
            trace.arrivals.iter().filter(|&&arrival| arrival > prefilled).count()
        };
        let num_steps = traces.iter().map(later).max()?;
        let num_tokens: usize = traces.iter().map(later).sum();
        let decode_s = last.duration_since(prefilled).as_secs_f64();
        let per_second = |count: usize| (count > 0).then(|| count as f64 / decode_s);
        Some(BatchFigures {
            latency_s: ended.duration_since(sent).as_secs_f64(),
            prefill_s,
            prefill_tokens_per_s: num_input_tokens as f64 / prefill_s,
            decode_tokens_per_s: per_second(num_tokens),
            decode_steps_per_s: per_second(num_steps),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request sent at 0 whose pieces arrive at these milliseconds.
    fn trace(base: Instant, arrivals_ms: &[u64], input: usize) -> RequestTrace {
        let at = |ms: u64| base + Duration::from_millis(ms);
        let arrivals: Vec<Instant> = arrivals_ms.iter().map(|&ms| at(ms)).collect();
        RequestTrace {
            sent: base,
            ended: *arrivals.last().unwrap(),
            num_input_tokens: input,
            num_cached_tokens: 0,
            num_output_tokens: arrivals.len(),
            arrivals,
        }
    }

    fn close(value: f64, expected: f64) -> bool {
        (value - expected).abs() < 1e-9 * expected.abs().max(1.0)
    }

    #[test]
    fn percentiles_interpolate_as_numpy_does() {
        // np.percentile([1, 2, 3, 4, 10], [50, 90, 99]) = [3, 7.6, 9.76]
        let spread = Spread::of(vec![10.0, 2.0, 3.0, 1.0, 4.0]).unwrap();
        assert!(close(spread.mean, 4.0) && close(spread.p50, 3.0) && spread.min == Some(1.0));
        assert!(close(spread.p90, 7.6) && close(spread.p99, 9.76) && close(spread.max, 10.0));
        let single = Spread::of(vec![5.0]).unwrap();
        assert!(close(single.p99, 5.0));
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn a_load_adds_up() {
        let base = Instant::now();
        let traces = vec![trace(base, &[100, 120, 150], 10), trace(base, &[200, 240, 280], 20)];
        let outcome =
            Outcome { traces, failures: Vec::new(), duration: Duration::from_millis(500) };
        let figures = LoadFigures::of(&outcome);
        assert_eq!((figures.completed, figures.failed), (2, 0));
        assert_eq!((figures.total_input_tokens, figures.total_output_tokens), (30, 6));
        assert!(close(figures.output_tokens_per_s, 12.0));
        assert!(close(figures.total_tokens_per_s, 72.0));
        assert!(close(figures.ttft_ms.unwrap().mean, 150.0));
        assert!(close(figures.tpot_ms.unwrap().mean, (25.0 + 40.0) / 2.0));
        assert!(close(figures.itl_ms.unwrap().max, 40.0));
        assert!(close(figures.e2e_ms.unwrap().max, 280.0));
    }

    #[test]
    fn a_batch_splits_where_its_last_request_has_a_token() {
        let base = Instant::now();
        let traces = [trace(base, &[100, 200, 300, 400], 50), trace(base, &[200, 300, 400], 50)];
        let batch = BatchFigures::of(&traces).unwrap();
        assert!(close(batch.prefill_s, 0.2) && close(batch.prefill_tokens_per_s, 500.0));
        assert!(close(batch.latency_s, 0.4));
        assert!(close(batch.decode_steps_per_s.unwrap(), 10.0));
        assert!(close(batch.decode_tokens_per_s.unwrap(), 20.0));
    }

    #[test]
    fn one_token_is_all_prefill() {
        let batch = BatchFigures::of(&[trace(Instant::now(), &[50], 8)]).unwrap();
        assert_eq!((batch.decode_tokens_per_s, batch.decode_steps_per_s), (None, None));
        assert!(close(batch.prefill_tokens_per_s, 160.0));
    }
}
