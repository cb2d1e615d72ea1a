//! How an epoch begins: choosing ranks, planning, telling them, and handing over the group.

use std::{sync::Arc, time::Instant};

use secondwind_model::{
    capabilities::Capabilities,
    plan::{self, ShardPlan},
};
use secondwind_proto::v1;
use tokio::sync::mpsc;

use super::{Collective, Membership};
use crate::cluster::{
    Group, GrpcLink, MemberId, State, WorkerLink,
    epoch::{Epoch, Member, group_info},
    send,
};

impl Membership {
    /// Starts an epoch when enough workers are there. Ranks follow the workers' names, then the order
    /// in which they came, so that a rack that restarts gets the same plan.
    pub(super) fn form_if_possible(&mut self) {
        let world = self.settings.world_size;
        if self.epoch.is_some() || self.members.len() < world {
            return;
        }
        let mut chosen: Vec<(&MemberId, &Member)> = self.members.iter().collect();
        chosen.sort_by(|a, b| (&a.1.join.worker, a.0).cmp(&(&b.1.join.worker, b.0)));
        chosen.truncate(world);
        let ids: Vec<MemberId> = chosen.iter().map(|(id, _)| **id).collect();
        if self.unusable == ids {
            return;
        }
        let (plan, collective, token) = match self.decide(&chosen) {
            Ok(decided) => decided,
            Err(reason) => {
                tracing::error!("these workers cannot serve: {reason}");
                self.state.send_replace(State::NoPlan { reason });
                self.unusable = ids;
                return;
            }
        };
        self.last_epoch += 1;
        let epoch = self.last_epoch;
        let plan_digest = plan::digest(
            &plan,
            &self.settings.checkpoint_digest,
            env!("CARGO_PKG_VERSION"),
        );
        tracing::info!(
            epoch,
            plan_digest,
            ?collective,
            "epoch forms\n{}",
            plan::table(&plan, &self.shape)
        );
        for (rank, (_, member)) in chosen.iter().enumerate() {
            send(
                &member.commands,
                v1::command::Command::Form(v1::Form {
                    epoch,
                    rank: rank as u32,
                    plan: Some((&plan).into()),
                    plan_digest: plan_digest.clone(),
                    collective: collective.into(),
                    peers: chosen
                        .iter()
                        .map(|(_, member)| member.join.peer_address.clone())
                        .collect(),
                    token: token.clone(),
                }),
            );
        }
        self.epoch = Some(Epoch {
            number: epoch,
            members: ids,
            plan: Arc::new(plan),
            plan_digest,
            ready: vec![None; world],
            progress: vec![(0, 0); world],
            progressed: vec![Instant::now(); world],
            events: None,
        });
    }

    /// Plan, way to meet, and secret of an epoch of these ranks.
    fn decide(
        &self,
        chosen: &[(&MemberId, &Member)],
    ) -> Result<(ShardPlan, v1::CollectiveKind, String), String> {
        let capabilities: Vec<Capabilities> = chosen
            .iter()
            .map(|(_, member)| member.capabilities.clone())
            .collect();
        let plan = plan::plan(&self.shape, &self.settings.plan, &capabilities)
            .map_err(|error| error.to_string())?;
        Ok((
            plan,
            collective_of(chosen, self.settings.collective)?,
            token()?,
        ))
    }

    /// All ranks are ready: hands the group to the step loop.
    pub(super) fn serve(&mut self) {
        let Some(epoch) = &mut self.epoch else { return };
        let (events, receiver) = mpsc::unbounded_channel();
        let links = epoch
            .members
            .iter()
            .filter_map(|member| self.members.get(member))
            .map(|member| {
                Box::new(GrpcLink {
                    epoch: epoch.number,
                    commands: member.commands.clone(),
                }) as Box<dyn WorkerLink>
            })
            .collect();
        epoch.events = Some(events);
        let info = group_info(epoch, &self.members);
        tracing::info!(epoch = epoch.number, "epoch serves");
        let group = Group {
            epoch: epoch.number,
            plan: epoch.plan.clone(),
            info: info.clone(),
            links,
            events: receiver,
            end: self.ends.0.clone(),
        };
        // Before anybody hears that it serves. The step loop ends only when the coordinator does.
        let _ = self.groups.send(group);
        self.state.send_replace(State::Serving(info));
    }
}

/// How the chosen workers can meet.
fn collective_of(
    chosen: &[(&MemberId, &Member)],
    wanted: Collective,
) -> Result<v1::CollectiveKind, String> {
    let hub = &chosen[0].1.join.local_hub;
    if chosen.len() == 1 {
        return Ok(v1::CollectiveKind::Solo);
    }
    if wanted == Collective::Auto
        && !hub.is_empty()
        && chosen
            .iter()
            .all(|(_, member)| member.join.local_hub == *hub)
    {
        return Ok(v1::CollectiveKind::Local);
    }
    if let Some((_, member)) = chosen
        .iter()
        .find(|(_, member)| member.join.peer_address.is_empty())
    {
        return Err(format!(
            "worker {} has no address for its peers: start it with --peer-listen",
            member.join.worker
        ));
    }
    let first = &chosen[0].1.join;
    let unlike = chosen
        .iter()
        .map(|(_, member)| &member.join)
        .find(|join| join.nccl_version.is_empty() || join.nccl_version != first.nccl_version);
    match (wanted, unlike) {
        (Collective::Grpc, _) => Ok(v1::CollectiveKind::Grpc),
        (_, None) => Ok(v1::CollectiveKind::Nccl),
        (Collective::Auto, Some(join)) => {
            if chosen
                .iter()
                .any(|(_, member)| !member.join.nccl_version.is_empty())
            {
                tracing::warn!(
                    worker = join.worker,
                    nccl = join.nccl_version,
                    "not every rank has the same NCCL: sums go over gRPC"
                );
            }
            Ok(v1::CollectiveKind::Grpc)
        }
        (Collective::Nccl, Some(join)) if join.nccl_version.is_empty() => Err(format!(
            "collective is nccl and worker {} has no card or no NCCL (pip: nvidia-nccl-cu12)",
            join.worker
        )),
        (Collective::Nccl, Some(join)) => Err(format!(
            "collective is nccl, worker {} has NCCL {} and worker {} has {}: install the same everywhere",
            first.worker, first.nccl_version, join.worker, join.nccl_version
        )),
    }
}

/// 128 random bits that only this epoch's workers are told.
fn token() -> Result<String, String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| format!("the system gives no random numbers: {error}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
