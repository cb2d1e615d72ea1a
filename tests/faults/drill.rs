//! One schedule: a group under load, the fault, and what must hold afterwards.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tokio::time::{sleep, timeout};

use crate::{
    clients::{self, Asking, Ended},
    daemon::{Held, Kind},
    rack::{PATIENCE, Rack},
    schedule::{Fault, Phase, Schedule},
};

/// Descriptors that a process may hold beyond the most that one held when the group was new: connections that are
/// about to close.
const DESCRIPTORS: usize = 4;
/// Resident memory that a process may gain over a run, as allocators keep what they once took.
const GROWTH_BYTES: u64 = 64 << 20;
/// Part of the time that a slow rank runs.
const RUNS: Duration = Duration::from_millis(20);
const RESTS: Duration = Duration::from_millis(80);

/// A rack, what it says when nothing is wrong, and what it then holds.
pub struct Ground {
    rack: Rack,
    undisturbed: Vec<Vec<u32>>,
    held: Vec<Held>,
}

impl Ground {
    pub async fn new(kind: Kind) -> Result<Self> {
        let rack = Rack::start(kind).await?;
        let undisturbed = clients::undisturbed(&rack).await?;
        for (request, answer) in clients::questions().iter().zip(&undisturbed) {
            if request.temperature == Some(0.0) {
                clients::follows_itself(&rack, request, answer).await?;
            }
        }
        let held = rack.held()?;
        Ok(Self {
            rack,
            undisturbed,
            held,
        })
    }

    pub fn logs(&self) -> String {
        self.rack.logs()
    }

    /// Runs a schedule. How long answers waited after the fault's end, if any still ran.
    pub async fn run(&mut self, schedule: &Schedule) -> Result<Option<Duration>> {
        self.rack.begin_logs()?;
        let before = self.rack.until_serving(1).await?;
        let mut asking: Vec<Asking> = clients::questions()
            .into_iter()
            .map(|request| Asking::start(&self.rack, request))
            .collect();
        self.lead_up(schedule, &mut asking[0]).await?;
        sleep(schedule.after).await;
        self.inflict(schedule).await?;
        let over = Instant::now();
        let mut ended = Vec::new();
        for asking in asking {
            ended.push(asking.end().await?);
        }
        self.judge(schedule, &ended)?;
        let waited = match schedule.fault {
            // It ends the answers: what counts is when others can begin.
            Fault::CoordinatorKill => {
                self.rack.until_serving(1).await?;
                Some(over.elapsed())
            }
            _ => clients::waited(&ended, over),
        };
        let bound = schedule.fault.bound();
        ensure!(
            waited.is_none_or(|waited| waited <= bound),
            "an answer went on after {waited:?}, more than {bound:?}"
        );
        let group = self.rack.until_serving(match schedule.fault.ends_epoch() {
            true => before.epoch + 1,
            false => 1,
        });
        let group = group.await?;
        let ranks = |group: &secondwind_proto::v1::Group| -> Vec<_> {
            let cuts = group.ranks.iter();
            cuts.map(|rank| (rank.worker.clone(), rank.query_heads.clone()))
                .collect()
        };
        ensure!(
            ranks(&before) == ranks(&group),
            "the group has another plan"
        );
        if schedule.fault == Fault::CoordinatorKill {
            let again = clients::undisturbed(&self.rack).await?;
            ensure!(
                again == self.undisturbed,
                "after a restart answers are others"
            );
        }
        self.rack.all_run()?;
        self.left_nothing().await?;
        Ok(waited)
    }

    /// Brings the rack to where the fault is due.
    async fn lead_up(&mut self, schedule: &Schedule, first: &mut Asking) -> Result<()> {
        if schedule.phase == Phase::Prefill {
            return Ok(());
        }
        let least = schedule.after_tokens as usize;
        let came = timeout(PATIENCE, first.tokens.wait_for(|&count| count >= least)).await;
        came.context("the first answer does not come")??;
        match schedule.phase {
            Phase::Prefill | Phase::Decode => Ok(()),
            Phase::Load => self.rack.restart_worker(schedule.victim, false),
            Phase::Reform => {
                let other = (schedule.victim + 1) % self.rack.kind.world();
                self.rack.restart_worker(other, false)
            }
        }
    }

    /// The fault, from its begin to its end.
    async fn inflict(&mut self, schedule: &Schedule) -> Result<()> {
        let (rack, victim, lasts) = (&mut self.rack, schedule.victim, schedule.lasts);
        match schedule.fault {
            Fault::Kill => rack.restart_worker(victim, false),
            Fault::Clock => rack.restart_worker(victim, true),
            Fault::CoordinatorKill => rack.restart_coordinator(),
            Fault::Stop => {
                rack.signal_worker(victim, Signal::STOP)?;
                sleep(lasts).await;
                rack.signal_worker(victim, Signal::CONT)
            }
            Fault::CoordinatorStop => {
                rack.signal_coordinator(Signal::STOP)?;
                sleep(lasts).await;
                rack.signal_coordinator(Signal::CONT)
            }
            Fault::Cut => {
                rack.host(victim).link(false)?;
                sleep(lasts).await;
                rack.host(victim).link(true)
            }
            Fault::Flap => {
                let begin = Instant::now();
                while begin.elapsed() < lasts {
                    rack.host(victim).link(false)?;
                    sleep(Duration::from_millis(40)).await;
                    rack.host(victim).link(true)?;
                    sleep(Duration::from_millis(150)).await;
                }
                Ok(())
            }
            Fault::Netem => {
                rack.host(victim).netem(true)?;
                sleep(lasts).await;
                rack.host(victim).netem(false)
            }
            Fault::Delay => {
                rack.proxy(victim).delay(Duration::from_millis(50));
                sleep(lasts).await;
                rack.proxy(victim).delay(Duration::ZERO);
                Ok(())
            }
            Fault::Corrupt => {
                rack.proxy(victim).corrupt(schedule.downwards);
                // Heartbeats alone make something pass within a second; a rank that is gone comes back.
                let begin = Instant::now();
                while !rack.proxy(victim).has_corrupted(schedule.downwards) {
                    ensure!(
                        begin.elapsed() < PATIENCE,
                        "nothing passed that could be corrupted"
                    );
                    sleep(Duration::from_millis(1)).await;
                }
                Ok(())
            }
            Fault::FullDisk => {
                rack.fill_disk(true)?;
                rack.restart_worker(victim, false)?;
                sleep(lasts).await;
                rack.fill_disk(false)
            }
            Fault::Slow => {
                let begin = Instant::now();
                while begin.elapsed() < lasts {
                    rack.signal_worker(victim, Signal::STOP)?;
                    sleep(RESTS).await;
                    rack.signal_worker(victim, Signal::CONT)?;
                    sleep(RUNS).await;
                }
                Ok(())
            }
        }
    }

    fn judge(&self, schedule: &Schedule, ended: &[Ended]) -> Result<()> {
        let killed = schedule.fault == Fault::CoordinatorKill;
        for (index, (ended, undisturbed)) in ended.iter().zip(&self.undisturbed).enumerate() {
            clients::check(ended, undisturbed, killed)
                .with_context(|| format!("answer {index}"))?;
        }
        Ok(())
    }

    /// Waits until nothing is held that was not held when the group was new.
    async fn left_nothing(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            let in_use = self.rack.in_use().await?;
            let held = self.rack.held()?;
            // A process that took another's place is held to the same.
            let least = |limit: &[Held]| limit.iter().map(|it| it.descriptors).max().unwrap_or(0);
            let (coordinator, workers) = (least(&self.held[..1]), least(&self.held[1..]));
            let within = held.iter().enumerate().all(|(index, it)| {
                let most = if index == 0 { coordinator } else { workers };
                it.descriptors <= most + DESCRIPTORS
            });
            let grown = held
                .iter()
                .zip(&self.held)
                .any(|(now, new)| now.resident_bytes > new.resident_bytes + GROWTH_BYTES);
            if in_use == [0.0; 3] && within && !grown {
                return Ok(());
            }
            ensure!(
                begin.elapsed() < Duration::from_secs(20),
                "running, waiting and KV blocks: {in_use:?}; {held:?} are held, at first {:?}",
                self.held
            );
            sleep(Duration::from_millis(100)).await;
        }
    }
}
