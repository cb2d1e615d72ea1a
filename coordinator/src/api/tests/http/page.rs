use hyper::Method;

use super::{answer, get, request, says, send, serve};

/// What a file of the page names to be loaded.
fn named(text: &str) -> Vec<String> {
    let names = ["src=\"", "href=\"", "from \"", "url("];
    let mut found = Vec::new();
    for name in names {
        for rest in text.split(name).skip(1) {
            let end = rest.find(['"', ')']).unwrap();
            found.push(rest[..end].to_owned());
        }
    }
    found
}

#[tokio::test]
async fn the_page_is_all_here_and_loads_nothing_from_elsewhere() {
    let served = serve(says(answer("x"))).await;
    let mut paths = vec!["/".to_owned()];
    let mut next = 0;
    while let Some(path) = paths.get(next).cloned() {
        next += 1;
        let reply = get(&served, &path).await;
        assert_eq!(reply.status, 200, "{path}");
        assert!(!reply.body.is_empty(), "{path}");
        let kind = match path.rsplit_once('.') {
            None => "text/html; charset=utf-8",
            Some((_, "css")) => "text/css; charset=utf-8",
            Some((_, "js")) => "text/javascript; charset=utf-8",
            Some((_, "svg")) => "image/svg+xml",
            other => panic!("{other:?}"),
        };
        assert_eq!(reply.headers["content-type"], kind, "{path}");
        assert_eq!(reply.headers["x-content-type-options"], "nosniff");
        assert_eq!(reply.headers["referrer-policy"], "no-referrer");
        let policy = reply.headers["content-security-policy"].to_str().unwrap();
        let mut directives = policy.split("; ");
        assert_eq!(directives.next(), Some("default-src 'none'"));
        for directive in directives {
            let (_, sources) = directive.split_once(' ').unwrap();
            assert!(matches!(sources, "'self'" | "'none'"), "{directive}");
        }
        for found in named(&reply.body) {
            let path = match found.strip_prefix("./") {
                Some(beside) => format!("/page/{beside}"),
                None if found.starts_with('#') => continue,
                None => found,
            };
            assert!(path.starts_with('/') && !path.starts_with("//"), "{path}");
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    // As many as there are: a name that this test does not see would go unnoticed.
    assert_eq!(paths.len(), 6, "{paths:?}");
}

#[tokio::test]
async fn no_style_or_script_stands_in_the_page_where_its_policy_forbids_it() {
    let served = serve(says(answer("x"))).await;
    let page = get(&served, "/").await.body;
    for forbidden in ["<style", " style=", " onclick=", "<script>", "javascript:"] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    for path in ["chat.js", "rack.js", "server.js"] {
        let script = get(&served, &format!("/page/{path}")).await.body;
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(!script.contains(forbidden), "{path}: {forbidden}");
        }
    }
}

#[tokio::test]
async fn the_page_is_only_read() {
    let served = serve(says(answer("x"))).await;
    let reply = send(served.address, request(Method::POST, "/", "")).await;
    assert_eq!(reply.status, 405);
    let reply = get(&served, "/page/other.js").await;
    assert_eq!(reply.status, 404);
}
