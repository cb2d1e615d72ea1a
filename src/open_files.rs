//! How many files this process may have open at a time, which is how many connections.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// For everything but clients' connections: workers, checkpoints, logs, those that are being refused.
const OTHERS: u64 = 256;

/// Raises the limit as far as `connections` need it, and returns how many of them fit.
pub fn room_for(connections: usize) -> usize {
    let needed = connections as u64 + OTHERS;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // None is no limit.
    let Some(current) = current.filter(|&current| current < needed) else {
        return connections;
    };
    let raised = maximum.map_or(needed, |maximum| maximum.min(needed));
    let raise = Rlimit {
        current: Some(raised),
        maximum,
    };
    let allowed = match setrlimit(Resource::Nofile, raise) {
        Ok(()) => raised,
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit of open files");
            current
        }
    };
    if allowed >= needed {
        return connections;
    }
    let fit = allowed.saturating_sub(OTHERS).max(1);
    tracing::warn!(
        max_connections = connections,
        open_files = allowed,
        "the limit of open files holds fewer connections than max_connections; taking {fit}"
    );
    usize::try_from(fit).unwrap_or(connections)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_asked_for_and_no_more_than_fit() {
        assert_eq!(room_for(1), 1);
        let maximum = getrlimit(Resource::Nofile).maximum;
        let most = maximum.and_then(|maximum| usize::try_from(maximum).ok());
        if let Some(most) = most.filter(|&most| most < usize::MAX / 2) {
            assert!(room_for(most + 1) <= most);
        }
    }
}
