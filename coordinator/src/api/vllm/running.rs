//! The requests that run, by the id that clients gave them, so that they can be aborted.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use secondwind_proto::v1;
use tokio::sync::oneshot;
use tokio_stream::{Stream, StreamMap};

use super::super::response::Responses;
use super::super::status::ApiError;

/// Sequences of a request, by their index.
pub(super) type Sequences = StreamMap<usize, Responses>;

/// A tenant, and an id among its requests.
type Key = (u32, String);

/// The table. An id is in it as long as its [`Run`] lives.
#[derive(Default)]
pub(super) struct Running {
    stages: Mutex<HashMap<Key, Arc<Mutex<Stage>>>>,
}

/// How far a request is.
enum Stage {
    Checking,
    Answering {
        sequences: Sequences,
        /// Goes with the sequences, which wakes the run.
        _awake: oneshot::Sender<()>,
    },
    Aborted,
}

impl Running {
    /// Registers a request; without an id it cannot be aborted.
    ///
    /// # Errors
    /// The id is taken.
    pub(super) fn enter(self: &Arc<Self>, tenant: u32, id: &str) -> Result<Run, ApiError> {
        let stage = Arc::new(Mutex::new(Stage::Checking));
        let key = (tenant, id.to_owned());
        if !id.is_empty() {
            let mut stages = locked(&self.stages);
            if stages.contains_key(&key) {
                let detail = format!("{id:?} names a request that runs; take another id");
                return Err(ApiError::value("request_id", detail));
            }
            stages.insert(key.clone(), Arc::clone(&stage));
        }
        Ok(Run {
            key,
            running: Arc::clone(self),
            stage,
            gone: None,
        })
    }

    /// Cancels the request's sequences at once, whether its answer is being read or not.
    pub(super) fn abort(&self, tenant: u32, id: String) {
        let stage = locked(&self.stages).get(&(tenant, id)).cloned();
        if let Some(stage) = stage {
            *locked(&stage) = Stage::Aborted;
        }
    }
}

/// One request that runs. Its items are what its sequences say; `None` before they have finished is an abort.
pub(super) struct Run {
    key: Key,
    running: Arc<Running>,
    stage: Arc<Mutex<Stage>>,
    gone: Option<oneshot::Receiver<()>>,
}

impl Run {
    /// The request was checked and handed to the step loop.
    pub(super) fn answer(&mut self, sequences: Sequences) {
        let mut stage = locked(&self.stage);
        if matches!(*stage, Stage::Checking) {
            let (_awake, gone) = oneshot::channel();
            *stage = Stage::Answering { sequences, _awake };
            self.gone = Some(gone);
        }
    }
}

impl Stream for Run {
    type Item = (usize, Result<v1::GenerateResponse, ApiError>);

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(gone) = &mut self.gone
            && Pin::new(gone).poll(cx).is_ready()
        {
            self.gone = None;
        }
        match &mut *locked(&self.stage) {
            Stage::Answering { sequences, .. } => Pin::new(sequences).poll_next(cx),
            Stage::Checking | Stage::Aborted => Poll::Ready(None),
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.key.1.is_empty() {
            locked(&self.running.stages).remove(&self.key);
        }
    }
}

/// Whoever panicked left whole values behind: all changes are single assignments.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
