//! The table of a whole run, in its place in `docs/reliability.md`.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context, Result};

use crate::schedule::{Fault, Phase};

const BEGIN: &str = "<!-- fault run: begin, written by tests/faults -->";
const END: &str = "<!-- fault run: end -->";

/// What came of the schedules that passed.
#[derive(Default)]
pub struct Report {
    passed: BTreeMap<(Fault, Phase), u64>,
    waited: BTreeMap<Fault, Vec<Duration>>,
}

impl Report {
    pub fn add(&mut self, fault: Fault, phase: Phase, waited: Option<Duration>) {
        *self.passed.entry((fault, phase)).or_default() += 1;
        self.waited.entry(fault).or_default().extend(waited);
    }

    fn table(&self) -> String {
        let mut table = String::from(
            "| fault | load | prefill | decode | re-form | goes on after it ends: median | longest | bound |\n|---|---|---|---|---|---|---|---|\n",
        );
        for fault in Fault::ALL {
            let mut waited = self.waited.get(&fault).cloned().unwrap_or_default();
            waited.sort();
            let count = |phase| match self.passed.get(&(fault, phase)) {
                Some(count) => count.to_string(),
                None => "-".into(),
            };
            let time = |time: Option<&Duration>| match time {
                Some(time) => format!("{:.2} s", time.as_secs_f64()),
                None => "-".into(),
            };
            let phases = [Phase::Load, Phase::Prefill, Phase::Decode, Phase::Reform].map(count);
            table += &format!(
                "| {} | {} | {} | {} | {} |\n",
                fault.name(),
                phases.join(" | "),
                time(waited.get(waited.len() / 2)),
                time(waited.last()),
                // What was not measured kept no bound.
                match waited.is_empty() {
                    true => "-".to_owned(),
                    false => format!("{} s", fault.bound().as_secs()),
                }
            );
        }
        table
    }

    /// Puts the table between its marks, or at the end of the file.
    pub fn write(&self, schedules: u64, took: Duration) -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reliability.md");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => "# Reliability\n".into(),
            Err(error) => return Err(error.into()),
        };
        let (before, after) = match text.split_once(BEGIN) {
            Some((before, rest)) => {
                let (_, after) = rest.split_once(END).context("the section has no end")?;
                (before.to_owned(), after)
            }
            None => (format!("{text}\n## The fault run\n\n"), "\n"),
        };
        let section = format!(
            "{BEGIN}\n`FAULT_SCHEDULES={schedules} cargo test --test faults`, {} passed of the schedules that this kernel can run, in {:.0} s.\nThree workers on CPUs and a coordinator, each in a network namespace of its own, four answers at a time;\na step may take 2 s. A corruption writes over 64 bytes, which no message survives; of plain text a single flipped bit can pass unnoticed.\nNumbers of schedules by the phase that the fault hits:\n\n{}{END}",
            self.passed.values().sum::<u64>(),
            took.as_secs_f64(),
            self.table()
        );
        Ok(fs::write(&path, before + &section + after)?)
    }
}
