//! A stream that does not wait for ever for who reads it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt};

use super::status::ApiError;

/// How long an answer may wait for its reader.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Items that are made before they are read. Few, because an answer that waits grows by itself: the tokens
/// that come meanwhile go into one response.
const AHEAD: usize = 2;

/// What a reader who keeps up sees is `source`. One who takes nothing for `patience` is told so, and
/// `source` is dropped.
pub(super) struct Paced<T> {
    receiver: mpsc::Receiver<Option<T>>,
    over: bool,
}

/// Reads `source` from a task of its own, which ends with the stream that is returned.
pub(super) fn paced<S>(source: S, patience: Duration) -> Paced<S::Item>
where
    S: Stream<Item: Send> + Send + Unpin + 'static,
{
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(pump(source, sender, patience));
    Paced {
        receiver,
        over: false,
    }
}

/// Sends each item, and `None` after the last one.
async fn pump<S>(mut source: S, sender: mpsc::Sender<Option<S::Item>>, patience: Duration)
where
    S: Stream + Unpin,
{
    loop {
        // The place comes first, so that what a slow reader is given next is as much as there is by then.
        let Ok(Ok(place)) = timeout(patience, sender.reserve()).await else {
            return;
        };
        let item = tokio::select! {
            item = source.next() => item,
            () = sender.closed() => return,
        };
        let last = item.is_none();
        place.send(item);
        if last {
            return;
        }
    }
}

impl<T> Stream for Paced<T> {
    type Item = Result<T, ApiError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let item = ready!(this.receiver.poll_recv(cx));
        this.over = !matches!(item, Some(Some(_)));
        Poll::Ready(match item {
            Some(item) => item.map(Ok),
            None => Some(Err(ApiError::SlowReader)),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_reader_who_keeps_up_gets_everything() {
        let items: Vec<u32> = paced(tokio_stream::iter(0..1000), PATIENCE)
            .map(Result::unwrap)
            .collect()
            .await;
        assert_eq!(items, (0..1000).collect::<Vec<u32>>());
    }

    #[tokio::test]
    async fn a_reader_who_takes_nothing_is_cut_off_and_the_source_dropped() {
        let held = Arc::new(());
        let source = tokio_stream::iter(vec![Arc::clone(&held); 100]);
        let mut slow = paced(source, Duration::from_millis(20));
        while Arc::strong_count(&held) > 1 + AHEAD {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut taken = 0;
        let end = loop {
            match slow.next().await {
                Some(Ok(_)) => taken += 1,
                other => break other,
            }
        };
        assert_eq!(taken, AHEAD);
        assert!(matches!(end, Some(Err(ApiError::SlowReader))));
        assert!(slow.next().await.is_none());
    }

    #[tokio::test]
    async fn a_reader_who_goes_away_drops_the_source() {
        let held = Arc::new(());
        let token = Arc::clone(&held);
        let source = tokio_stream::pending::<()>().map(move |()| {
            let _ = &token;
        });
        drop(paced(source, PATIENCE));
        while Arc::strong_count(&held) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
