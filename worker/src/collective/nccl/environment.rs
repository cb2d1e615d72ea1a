//! What NCCL reads of the environment and a worker decides.

use std::net::IpAddr;

use super::NcclError;

/// `1` keeps NCCL from moving data from card to card.
const P2P_DISABLE: &str = "NCCL_P2P_DISABLE";

/// Has NCCL's sockets, which know no authentication, use one interface only: the named one, what the
/// environment says already, or the one that has `address`. Gives the interface's name.
///
/// # Errors
/// [`NcclError::Interface`] if there is no such interface.
pub fn choose_interface(named: Option<&str>, address: IpAddr) -> Result<String, NcclError> {
    const VARIABLE: &str = "NCCL_SOCKET_IFNAME";
    if std::env::var_os(P2P_DISABLE).is_none() {
        // As if it were not set, but there: `disable_p2p` may come later.
        // SAFETY: as below.
        unsafe { std::env::set_var(P2P_DISABLE, "0") };
    }
    if let (None, Ok(set)) = (named, std::env::var(VARIABLE)) {
        return Ok(set);
    }
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    let chosen = interfaces.iter().find(|interface| match named {
        Some(name) => interface.name == name,
        None => interface.ip() == address,
    });
    let Some(chosen) = chosen else {
        let mut known: Vec<_> = interfaces.iter().map(|it| it.name.as_str()).collect();
        known.dedup();
        return Err(NcclError::Interface {
            wanted: named.map_or_else(|| address.to_string(), str::to_owned),
            known: known.join(", "),
        });
    };
    // SAFETY: comes before the worker's own threads start; the runtime's read no environment meanwhile.
    unsafe { std::env::set_var(VARIABLE, format!("={}", chosen.name)) };
    Ok(chosen.name.clone())
}

/// Has NCCL move nothing from card to card, for what arrives there is wrong.
pub fn disable_p2p() {
    // SAFETY: the C library replaces a variable that is there in one store and frees nothing, so that
    // threads which read the environment meanwhile see the one or the other; `choose_interface` made it.
    unsafe { std::env::set_var(P2P_DISABLE, "1") };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_interface_is_refused_with_those_that_there_are() {
        let address = IpAddr::from([127, 0, 0, 1]);
        let error = choose_interface(Some("nowhere0"), address).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("nowhere0") && text.contains("lo"), "{text}");
    }
}
