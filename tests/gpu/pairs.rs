//! Two cards that sum over NCCL.

use std::{path::Path, sync::Arc};

use secondwind_kernels::cuda::Arch;
use secondwind_model::{checkpoint::Checkpoint, plan::ShardPlan};
use secondwind_worker::{
    backend::CudaBackend,
    bench::BenchRank,
    collective::{local, nccl::Nccl},
    loader,
    timeline::{Mark, Part},
};

use crate::{
    agreement::agrees,
    ranks::{
        self, On, Ranks, Setup, Via,
        oracle::{TOLERANCE, folders, golden},
    },
};

pub fn two_cards(arch: Option<Arch>) {
    agrees(&Setup {
        on: On::Card(arch),
        via: Via::Nccl,
        split: Some(vec![3.0, 2.0]),
        ..Setup::world(2)
    });
}

/// Prompts that two cards work on in two parts, as any step of so many tokens over NCCL, the second of which begins
/// within a sequence; against one card, which sums nothing.
pub fn two_parts(arch: Option<Arch>) {
    let one = Setup {
        on: On::Card(arch),
        step_tokens: 1024,
        ..Setup::world(1)
    };
    let two = Setup {
        via: Via::Nccl,
        split: Some(vec![3.0, 2.0]),
        world: 2,
        ..one.clone()
    };
    for name in ["qwen2_4bit_g64_act_order", "qwen3_4bit_v2_asym"] {
        let folder = folders().into_iter().find(|folder| folder.ends_with(name));
        let folder = folder.expect("the checkpoint is in the repository");
        let tokens = &golden(&folder)[0].tokens;
        let prompts = [100, 400, 250].map(|len| -> Vec<u32> {
            let cycled = tokens.iter().cycle().skip(len / 3);
            cycled.take(len).copied().collect()
        });
        let [alone, together] = [&one, &two].map(|setup| {
            let mut ranks = Ranks::load(&folder, 512, setup);
            let rows = prompts
                .iter()
                .map(|prompt| ranks.sequence(prompt.len()).row(prompt, &prompt[1..], None))
                .collect();
            let result = ranks.step(rows, Vec::new());
            let plan = ranks.plan.clone();
            drop(ranks);
            if setup.world == 2 {
                assert_eq!(parts(&folder, &plan, arch, 512), [2, 2]);
                assert_eq!(parts(&folder, &plan, arch, 511), [1, 1]);
            }
            let logprobs = result.rows.into_iter().map(|row| {
                let of = row.prompt_logprobs.into_iter();
                of.map(|of| of.logprob).collect::<Vec<f32>>()
            });
            logprobs.collect::<Vec<_>>()
        });
        assert_eq!(
            alone.iter().map(Vec::len).collect::<Vec<_>>(),
            [99, 399, 249]
        );
        for (alone, together) in alone.iter().flatten().zip(together.iter().flatten()) {
            let difference = (alone - together).abs();
            assert!(
                difference <= TOLERANCE,
                "{name}: {together} in two parts, {alone} on one card"
            );
        }
    }
}

/// In how many parts each of two ranks works on a prompt, the first step after load: sums that layer 0 waits for.
fn parts(folder: &Path, plan: &ShardPlan, arch: Option<Arch>, tokens: usize) -> Vec<usize> {
    let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
    let nccl = Arc::new(Nccl::open(None).unwrap());
    let threads: Vec<_> = local::meshes(2, ranks::DEADLINE)
        .into_iter()
        .enumerate()
        .map(|(rank, mesh)| {
            let (checkpoint, plan, nccl) = (checkpoint.clone(), plan.clone(), nccl.clone());
            std::thread::spawn(move || {
                let card = ranks::card(rank, arch);
                let backend = CudaBackend::new(card, None, None, Some(nccl)).unwrap();
                let load = |backend: &mut CudaBackend| {
                    loader::load(backend, &checkpoint, &plan, rank, |_, _| true)
                };
                let shape = checkpoint.shape().unwrap();
                let rank = BenchRank::new(backend, &shape, &plan, load, Box::new(mesh), true);
                let profiled = rank.unwrap().profile(|rank| rank.prompt(1, tokens));
                let sum = Mark {
                    layer: Some(0),
                    part: Part::AttentionSum,
                };
                let spans = profiled.unwrap().spans;
                spans.iter().filter(|span| span.mark == sum).count()
            })
        })
        .collect();
    let parts = threads.into_iter().map(|thread| thread.join().unwrap());
    parts.collect()
}
