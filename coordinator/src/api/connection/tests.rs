//! Connections that say nothing, and such as take nothing.

use tokio_stream::StreamExt;

use super::*;

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut_off() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let mut connections = Connections::new(listener, ConnectionLimits::default());
    let mut connection = connections.next().await.unwrap().unwrap();
    assert!(connection.stream.nodelay().unwrap());
    connection.patience = Duration::from_millis(50);
    // More than the buffers of both ends hold.
    let error = connection.write_all(&vec![0; 64 << 20]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(client);
}

#[tokio::test]
async fn a_client_that_does_not_begin_is_cut_off() {
    for (said, begins) in [
        ("", false),
        ("PRI * HT", false),
        ("POST", true),
        ("PRI /", true),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let places = Arc::new(Semaphore::new(1));
        let place = places.acquire_owned().await.unwrap();
        let greeting = Duration::from_millis(50);
        let mut connection = Connection::new(stream, place, PATIENCE, greeting, PATIENCE);
        client.write_all(said.as_bytes()).await.unwrap();
        let mut heard = vec![0; said.len()];
        connection.read_exact(&mut heard).await.unwrap();
        let rest = timeout(Duration::from_millis(200), connection.read_u8());
        match rest.await {
            Ok(cut_off) => {
                assert_eq!(cut_off.unwrap_err().kind(), ErrorKind::TimedOut);
                assert!(!begins, "{said:?}");
            }
            Err(_) => assert!(begins, "{said:?}"),
        }
    }
}

#[tokio::test]
async fn a_client_that_reads_is_not() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let mut connections = Connections::new(listener, ConnectionLimits::default());
    let mut connection = connections.next().await.unwrap().unwrap();
    connection.patience = Duration::from_secs(30);
    let reader = tokio::spawn(async move {
        let mut all = Vec::new();
        AsyncReadExt::read_to_end(&mut client, &mut all)
            .await
            .unwrap();
        all.len()
    });
    connection.write_all(&vec![0; 16 << 20]).await.unwrap();
    drop(connection);
    assert_eq!(reader.await.unwrap(), 16 << 20);
}
