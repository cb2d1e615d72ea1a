//! A coordinator and CPU workers in this process, on loopback, for `demo`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use secondwind_coordinator::{Collective, Coordinator, CoordinatorConfig};
use secondwind_worker::{LocalHub, WorkerConfig};
use tokio::{net::TcpListener, task::JoinSet, time::timeout};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    client,
    signals::{Stop, Stopper},
};

/// A running cluster.
pub struct LocalCluster {
    endpoint: String,
    stopper: Stopper,
    /// The coordinator and each worker; a part that ends early carries its reason.
    parts: JoinSet<Result<()>>,
}

impl LocalCluster {
    /// Starts a coordinator and `coordinator.world_size` workers made after `worker`. Clients are heard at
    /// `listen`.
    pub async fn start(
        coordinator: CoordinatorConfig,
        worker: &WorkerConfig,
        listen: SocketAddr,
    ) -> Result<Self> {
        let client = TcpListener::bind(listen)
            .await
            .with_context(|| format!("coordinator.listen: cannot listen on {listen}"))?;
        let cluster = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .context("cannot listen on loopback")?;
        let endpoint = format!("http://{}", client.local_addr()?);
        let dial = format!("http://{}", cluster.local_addr()?);
        let world_size = coordinator.world_size;
        let in_memory = coordinator.collective == Collective::Auto;
        let coordinator = Coordinator::prepare(coordinator)?;
        let (stopper, stop) = Stop::manual();
        let mut parts = JoinSet::new();
        let asked = stop.asked();
        parts.spawn(async move {
            coordinator
                .run(client, cluster, asked)
                .await
                .context("coordinator")
        });
        // Without a hub the workers meet over gRPC, as on a rack.
        let hub = in_memory.then(|| Arc::new(LocalHub::default()));
        for index in 0..world_size {
            let name = format!("worker-{index}");
            let config = WorkerConfig {
                coordinator: dial.clone(),
                name: name.clone(),
                local_hub: hub.clone(),
                ..worker.clone()
            };
            let asked = stop.asked();
            parts.spawn(async move {
                secondwind_worker::run(config, asked)
                    .await
                    .with_context(|| format!("worker {name}"))
            });
        }
        Ok(Self {
            endpoint,
            stopper,
            parts,
        })
    }

    /// Where clients find it.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Until the group serves; an error as soon as a part gives up.
    pub async fn until_serving(&mut self) -> Result<()> {
        let endpoint = self.endpoint.clone();
        let lost = tokio::select! {
            serving = serving(&endpoint) => serving,
            reason = self.failed() => return Err(reason),
        };
        match lost {
            Ok(()) => Ok(()),
            // A coordinator that gave up is the cause of what its client sees.
            Err(lost) => match timeout(Duration::from_secs(1), self.failed()).await {
                Ok(reason) => Err(reason),
                Err(_) => Err(lost),
            },
        }
    }

    /// Runs `work` on the cluster; an error as soon as a part gives up.
    pub async fn during<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            done = work => done,
            reason = self.failed() => Err(reason),
        }
    }

    /// Asks all parts to stop and awaits them; the first failure counts.
    pub async fn stop(mut self, grace: Duration) -> Result<()> {
        self.stopper.stop();
        let ended = async {
            let mut outcome = Ok(());
            while let Some(part) = self.parts.join_next().await {
                outcome = outcome.and(flatten(part));
            }
            outcome
        };
        timeout(grace, ended)
            .await
            .map_err(|_| anyhow!("did not stop within {grace:?}"))?
    }

    /// The reason of the first part that ends although nobody asked it to.
    async fn failed(&mut self) -> anyhow::Error {
        match self.parts.join_next().await.map(flatten) {
            Some(Err(reason)) => reason,
            Some(Ok(())) | None => {
                anyhow!("a part of the cluster ended although nobody asked it to")
            }
        }
    }
}

fn flatten(part: Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    part.context("a part of the cluster panicked")?
}

/// Watches the coordinator's health until it serves.
async fn serving(endpoint: &str) -> Result<()> {
    let channel = client::channel(endpoint).await?;
    let mut health = HealthClient::new(channel);
    let request = HealthCheckRequest {
        service: "secondwind.v1.Inference".into(),
    };
    let mut changes = health
        .watch(request)
        .await
        .context("cannot watch the coordinator's health")?
        .into_inner();
    while let Some(change) = changes
        .message()
        .await
        .context("cannot watch the coordinator's health")?
    {
        if change.status() == ServingStatus::Serving {
            return Ok(());
        }
    }
    Err(anyhow!("the coordinator went away before it served"))
}
