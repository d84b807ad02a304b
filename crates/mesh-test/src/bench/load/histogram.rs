// SPDX-License-Identifier: Apache-2.0
//! A latency histogram in bounded memory with a relative error of at most 1/64.

/// Number of buckets per power of two.
const STEPS: u64 = 64;
/// log2 of [`STEPS`].
const STEP_BITS: u32 = 6;

/// Counts of latencies by bucket.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        // Values below STEPS have one bucket each; each power of two above has STEPS buckets.
        let places = (64 - STEP_BITS as usize + 1) << STEP_BITS;
        let (counts, total) = (vec![0; places], 0);
        Self { counts, total }
    }
}

impl Histogram {
    /// Adds one latency in nanoseconds.
    pub fn add(&mut self, nanos: u64) {
        self.counts[place(nanos)] += 1;
        self.total += 1;
    }

    /// Adds the counts of another histogram.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
    }

    /// Returns the latency in microseconds at quantile `part` (0 to 1), or 0 if the histogram is
    /// empty.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts and latencies are far below 2^52"
    )]
    pub fn micros(&self, part: f64) -> f64 {
        let wanted = self.total as f64 * part;
        let mut below = 0;
        let reached = self.counts.iter().position(|count| {
            below += count;
            below > 0 && below as f64 >= wanted
        });
        reached.map_or(0.0, |place| middle(place as u64) / 1000.0)
    }
}

fn place(nanos: u64) -> usize {
    let octave = (u64::BITS - nanos.leading_zeros()).saturating_sub(STEP_BITS + 1);
    let step = nanos >> octave;
    let place = u64::from(octave) * STEPS + step;
    usize::try_from(place).unwrap_or(usize::MAX)
}

/// Returns the middle of a bucket's range.
#[expect(
    clippy::cast_precision_loss,
    reason = "an error of 2^-53 is far below that of the bucket"
)]
fn middle(place: u64) -> f64 {
    let octave = (place / STEPS).saturating_sub(1);
    let step = place - octave * STEPS;
    let width = (1_u64 << octave) as f64;
    step as f64 * width + (width - 1.0) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_values_are_exact_to_a_sixty_fourth() {
        let mut values: Vec<u64> = (0..200).collect();
        values.extend((6..64).flat_map(|bit| {
            let power = 1_u64 << bit;
            [power - 1, power, power + 1, power + power / 3]
        }));
        values.push(u64::MAX);
        for value in values {
            let found = middle(place(value) as u64);
            let error = (found - value as f64).abs();
            assert!(error <= value as f64 / 64.0, "{value} became {found}");
        }
    }

    #[test]
    fn histogram_reports_percentiles() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.micros(0.5).to_string(), "0");
        let mut other = Histogram::default();
        for value in 1..=100_u64 {
            let to = if value % 2 == 0 {
                &mut histogram
            } else {
                &mut other
            };
            to.add(value * 1000);
        }
        histogram.merge(&other);
        for (part, expected) in [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)] {
            let found = histogram.micros(part);
            assert!(
                (found - expected).abs() <= expected / 64.0,
                "{part}: {found}"
            );
        }
    }
}
