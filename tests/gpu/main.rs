//! The golden checkpoints on a card, by the code of every architecture that it can run. Without a card
//! every test is listed as ignored.

mod agreement;
#[path = "../cluster/exam.rs"]
mod exam;
#[allow(dead_code)] // Shared with the tests of clusters.
#[path = "../cluster/harness.rs"]
mod harness;
mod pairs;
#[path = "../ranks/mod.rs"]
mod ranks;
mod sampling;

use std::sync::{PoisonError, RwLock};

use agreement::{
    card_and_cpu, embedded_model, exact, fast, half_cache, int8_cache, int8_head, plainest,
};
use libtest_mimic::{Arguments, Trial};
use pairs::{two_cards, two_parts};
use sampling::{guesses_and_masks, rules};
use secondwind_kernels::cuda::{Arch, device_count};

/// A sum over NCCL holds its cards until every rank has come, so nothing else of this process may wait
/// for them meanwhile.
static CARDS: RwLock<()> = RwLock::new(());

/// A test of the code of an architecture; `None` is the card's own.
type Check = fn(Option<Arch>);

fn main() {
    let missing = match device_count() {
        Ok(0) => Some("the driver sees no card".to_owned()),
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    };
    let mut trials = Vec::new();
    let mut add = |name: String, test: Check, arch: Option<Arch>| {
        let trial = Trial::test(name, move || {
            let _shared = CARDS.read().unwrap_or_else(PoisonError::into_inner);
            test(arch);
            Ok(())
        });
        trials.push(match &missing {
            Some(why) => trial.with_ignored_flag(true).with_kind(why),
            None => trial,
        });
    };
    for arch in [
        Some(Arch::Sm60),
        Some(Arch::Sm61),
        Some(Arch::Sm70),
        Some(Arch::Sm75),
        None,
    ] {
        let name = arch.map_or("own code", Arch::name);
        add(
            format!("{name}: exact family agrees with the oracle"),
            exact,
            arch,
        );
        add(
            format!("{name}: f32 and eager agree with the oracle"),
            plainest,
            arch,
        );
        add(
            format!("{name}: int8 activations stay close to the oracle"),
            fast,
            arch,
        );
        add(
            format!("{name}: an f16 cache stays close"),
            half_cache,
            arch,
        );
        add(
            format!("{name}: an int8 cache stays close"),
            int8_cache,
            arch,
        );
        add(
            format!("{name}: a card and a cpu worker agree over grpc"),
            card_and_cpu,
            arch,
        );
        add(
            format!("{name}: an int8 lm_head stays close"),
            int8_head,
            arch,
        );
        add(
            format!("{name}: the embedded model knows as much as on a cpu"),
            embedded_model,
            arch,
        );
        add(
            format!("{name}: rules change logits as on a cpu"),
            rules,
            arch,
        );
        add(
            format!("{name}: guesses are decoding, masks hold"),
            guesses_and_masks,
            arch,
        );
    }
    let one_card = matches!(device_count(), Ok(1)).then(|| "the driver sees one card".to_owned());
    let missing_pair = missing.clone().or(one_card);
    let pairs: [(&str, Check); 2] = [
        ("two cards agree over NCCL", two_cards),
        ("a step in two parts is the same step", two_parts),
    ];
    for arch in [Some(Arch::Sm61), Some(Arch::Sm75), None] {
        let name = arch.map_or("own code", Arch::name);
        for (what, test) in pairs {
            let trial = Trial::test(format!("{name}: {what}"), move || {
                let _alone = CARDS.write().unwrap_or_else(PoisonError::into_inner);
                test(arch);
                Ok(())
            });
            trials.push(match &missing_pair {
                Some(why) => trial.with_ignored_flag(true).with_kind(why),
                None => trial,
            });
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
