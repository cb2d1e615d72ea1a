//! Memory that was planned against memory that was taken. Pure.

use secondwind_model::plan::RankMemory;
use secondwind_worker::loader::{Phase, Readings};
use serde::Serialize;

use crate::output;

/// One purpose.
#[derive(Debug, PartialEq, Serialize)]
pub struct Purpose {
    /// What for.
    pub purpose: &'static str,
    /// None of what no plan counts.
    pub planned_bytes: Option<u64>,
    /// None where it was not read.
    pub measured_bytes: Option<u64>,
    /// Of what was planned.
    pub difference_percent: Option<f64>,
}

/// The name of what was there before anything was loaded.
const BEFORE: &str = "before_loading";

/// Purpose by purpose, and all that the model took in the end.
pub fn compare(planned: &RankMemory, readings: &Readings) -> Vec<Purpose> {
    let before = readings.0.first().map(|(_, used)| *used);
    let purposes = [
        (BEFORE, None, before),
        (
            "weights",
            Some(planned.weights + planned.padding + planned.scales),
            readings.taken(Phase::Weights),
        ),
        (
            "kv_cache",
            Some(planned.kv_cache),
            readings.taken(Phase::KvCache),
        ),
        (
            "buffers_scratch",
            Some(planned.buffers + planned.scratch),
            readings.taken(Phase::Buffers),
        ),
        (
            "nccl",
            Some(planned.nccl),
            readings.taken(Phase::Communicator),
        ),
        (
            "graphs",
            Some(planned.graphs),
            readings.taken(Phase::Recordings),
        ),
        ("first_steps", None, readings.taken(Phase::Steps)),
        (
            "total",
            Some(planned.total()),
            (readings.0.len() > 1).then(|| readings.total()),
        ),
    ];
    purposes
        .into_iter()
        .filter(|(_, planned, measured)| planned.unwrap_or(0) + measured.unwrap_or(0) > 0)
        .map(|(purpose, planned_bytes, measured_bytes)| Purpose {
            purpose,
            planned_bytes,
            measured_bytes,
            difference_percent: planned_bytes.zip(measured_bytes).and_then(
                |(planned, measured)| {
                    let more = measured as f64 - planned as f64;
                    (planned > 0).then(|| 100.0 * more / planned as f64)
                },
            ),
        })
        .collect()
}

/// As a table.
pub fn render(purposes: &[Purpose]) -> String {
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".into(), output::bytes);
    let rows: Vec<Vec<String>> = purposes
        .iter()
        .map(|row| {
            vec![
                row.purpose.replace('_', " "),
                bytes(row.planned_bytes),
                bytes(row.measured_bytes),
                row.difference_percent
                    .map_or_else(String::new, |percent| format!("{percent:+.1} %")),
            ]
        })
        .collect();
    output::table(
        &["memory", "planned", "measured", "difference"],
        &rows,
        &[1, 2, 3],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_held_against_their_plan() {
        let planned = RankMemory {
            weights: 70,
            padding: 10,
            scales: 20,
            kv_cache: 50,
            scratch: 3,
            buffers: 7,
            graphs: 10,
            nccl: 0,
        };
        let readings = Readings(vec![
            (Phase::Before, 1000),
            (Phase::Weights, 1110),
            (Phase::KvCache, 1160),
            (Phase::Buffers, 1169),
            (Phase::Recordings, 1184),
            (Phase::Steps, 1186),
        ]);
        let found = compare(&planned, &readings);
        let cells: Vec<_> = found
            .iter()
            .map(|row| (row.purpose, row.planned_bytes, row.measured_bytes))
            .collect();
        assert_eq!(
            cells,
            [
                (BEFORE, None, Some(1000)),
                ("weights", Some(100), Some(110)),
                ("kv_cache", Some(50), Some(50)),
                ("buffers_scratch", Some(10), Some(9)),
                ("graphs", Some(10), Some(15)),
                ("first_steps", None, Some(2)),
                ("total", Some(170), Some(186)),
            ]
        );
        let percent: Vec<_> = found.iter().map(|row| row.difference_percent).collect();
        assert_eq!(
            percent[..5],
            [None, Some(10.0), Some(0.0), Some(-10.0), Some(50.0)]
        );
        assert!(render(&found).contains("+50.0 %"));
        // A device that cannot say has its plan to show.
        let unread = compare(&planned, &Readings::default());
        assert!(unread.iter().all(|row| row.measured_bytes.is_none()));
    }
}
