//! SIGTERM and SIGINT as one event that many can await.

use std::{future::Future, time::Duration};

use anyhow::{Context, Result, bail};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Awaits the request to stop.
#[derive(Clone, Debug)]
pub struct Stop {
    asked: watch::Receiver<bool>,
}

/// Asks to stop; dropping it asks too.
#[derive(Debug)]
pub struct Stopper {
    asking: watch::Sender<bool>,
}

impl Stopper {
    /// Asks everyone who awaits.
    pub fn stop(&self) {
        self.asking.send_replace(true);
    }
}

impl Stop {
    /// A request that only this process makes.
    pub fn manual() -> (Stopper, Self) {
        let (asking, asked) = watch::channel(false);
        (Stopper { asking }, Self { asked })
    }

    /// A request that SIGTERM and SIGINT make.
    pub fn on_signal() -> Result<Self> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let (stopper, stop) = Self::manual();
        tokio::spawn(async move {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            tracing::info!("{name}: stopping");
            stopper.stop();
        });
        Ok(stop)
    }

    /// Until the request.
    pub fn asked(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut asked = self.asked.clone();
        async move {
            // An error says that the stopper is gone, which asks too.
            let _ = asked.wait_for(|asked| *asked).await;
        }
    }

    /// Awaits `work`, and for at most `grace` once it was asked to stop.
    pub async fn within<T>(&self, grace: Duration, work: impl Future<Output = T>) -> Result<T> {
        let overdue = async {
            self.asked().await;
            tokio::time::sleep(grace).await;
        };
        tokio::select! {
            done = work => Ok(done),
            () = overdue => bail!("did not stop within {grace:?}"),
        }
    }
}
