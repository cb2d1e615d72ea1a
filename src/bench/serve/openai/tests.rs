use std::time::Instant;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;

/// Answers one connection after the other: the models, then `answer` as it is; tells what it was asked.
async fn server(answer: &'static str) -> (Uri, tokio::task::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}/v1/", listener.local_addr().unwrap());
    let models = r#"{"data": [{"id": "little"}, {"id": "other"}]}"#;
    let models = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{models}");
    let answering = tokio::spawn(async move {
        let mut asked = Vec::new();
        for reply in [models, answer.to_owned()] {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut text = String::new();
            // A request ends with its body, whose last byte closes the object; the first one has none.
            while !(text.ends_with('}') || text.starts_with("GET") && text.ends_with("\r\n\r\n")) {
                let mut some = [0; 4096];
                let read = stream.read(&mut some).await.unwrap();
                text += std::str::from_utf8(&some[..read]).unwrap();
            }
            asked.push(text);
            // In pieces that end anywhere.
            for piece in reply.as_bytes().chunks(7) {
                stream.write_all(piece).await.unwrap();
                stream.flush().await.unwrap();
            }
        }
        asked
    });
    (uri.parse().unwrap(), answering)
}

/// What comes of one request that is answered so, and how many pieces were heard.
async fn ask(
    answer: &'static str,
    cancel_after: Option<u32>,
) -> (Result<Option<Usage>, String>, usize, Vec<String>) {
    let (base, answering) = server(answer).await;
    let key = HeaderValue::from_static("Bearer secret");
    let server = OpenAi::find(base, Some(key)).await.unwrap();
    assert_eq!(server.model, "little");
    let ask = Ask {
        prompt: vec![5, 6],
        output_tokens: 3,
        cancel_after,
    };
    let mut listener = Listener::new(Instant::now(), &ask);
    let ended = server.ask(&ask, &mut listener).await;
    let record = listener.end(0.0, ended.clone());
    drop(server);
    // A server whose client has gone may fail to write the rest.
    let asked = answering.await.unwrap_or_default();
    (ended, record.pieces.len(), asked)
}

const STREAM: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n\
    : a comment\n\n\
    data: {\"choices\": [{\"text\": \"\", \"index\": 0}], \"usage\": null}\n\n\
    data: {\"choices\": [{\"text\": \"eins\"}]}\r\n\r\n\
    data:{\"choices\": [{\"text\": \"zw\u{f6}lf\"}]}\n\n\
    data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 2, \"completion_tokens\": 3, \"total_tokens\": 5,\
    \"prompt_tokens_details\": {\"cached_tokens\": 1}}}\n\n\
    data: [DONE]\n\n";

#[tokio::test]
async fn an_answer_is_heard_to_its_end() {
    let (ended, pieces, asked) = ask(STREAM, None).await;
    let usage = Usage {
        prompt_tokens: 2,
        cached_prompt_tokens: 1,
        completion_tokens: 3,
    };
    assert_eq!((ended, pieces), (Ok(Some(usage)), 2));
    assert!(
        asked[0].starts_with("GET /v1/models HTTP/1.1\r\n"),
        "{asked:?}"
    );
    assert!(
        asked[1].starts_with("POST /v1/completions HTTP/1.1\r\n"),
        "{asked:?}"
    );
    for words in [
        "authorization: Bearer secret",
        "\"prompt\":[5,6]",
        "\"max_tokens\":3",
    ] {
        assert!(asked[1].contains(words), "{words}: {asked:?}");
    }
}

#[tokio::test]
async fn a_request_is_given_up_after_its_piece() {
    let (ended, pieces, _) = ask(STREAM, Some(1)).await;
    assert_eq!((ended, pieces), (Ok(None), 1));
}

#[tokio::test]
async fn what_is_no_whole_answer_has_a_kind() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
    for (answer, kind) in [
        (
            "HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\n\r\n{}",
            "HTTP 429",
        ),
        ("", "no connection"),
        (HEAD, "the answer broke off"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ndata: ",
            "the answer broke off",
        ),
        (
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: [DONE]\n\n",
            "no usage in the stream",
        ),
        (
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {\"error\": {\"message\": \"a\"}}\n\n",
            "error in the stream",
        ),
        (
            "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {{\n\n",
            "not a chunk of an answer",
        ),
    ] {
        let (ended, ..) = ask(answer, None).await;
        assert_eq!(ended, Err(kind.to_owned()), "{answer}");
    }
}
