//! What a soak asks, and which codes each kind of request may get. Requests are a function of seed and number.

use crate::random::Random;

/// One kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    HttpWhole,
    HttpStream,
    HttpChat,
    /// The connection breaks while the answer streams.
    HttpDisconnect,
    /// The connection breaks within the body of the request.
    HttpHalfBody,
    HttpNotHttp,
    HttpBrokenJson,
    HttpNotUtf8,
    HttpNotObject,
    HttpWrongType,
    HttpMediaType,
    HttpOverLong,
    HttpPromptTooLong,
    HttpOtherModel,
    HttpNoPath,
    HttpMethod,
    Grpc,
    /// On a connection of its own.
    GrpcConnect,
    /// The stream is dropped.
    GrpcCancel,
    /// The connection is dropped, with its streams.
    GrpcDisconnect,
    GrpcDeadline,
    GrpcPromptTooLong,
    GrpcOtherToken,
    GrpcTemperature,
    GrpcStopNotUtf8,
    GrpcNoPrompt,
    GrpcOverLong,
}

use Kind::*;

/// Kind, weight, codes.
pub const MIX: [(Kind, u32, &[&str]); 27] = [
    (HttpWhole, 100, &["200", "429"]),
    (HttpStream, 100, &["200", "429"]),
    (HttpChat, 40, &["200", "429"]),
    (HttpDisconnect, 60, &["200", "429", "left"]),
    (HttpHalfBody, 10, &["left"]),
    (HttpNotHttp, 10, &["400", "closed"]),
    (HttpBrokenJson, 20, &["400"]),
    (HttpNotUtf8, 20, &["400"]),
    (HttpNotObject, 20, &["400"]),
    (HttpWrongType, 20, &["400"]),
    (HttpMediaType, 10, &["415"]),
    (HttpOverLong, 4, &["413"]),
    (HttpPromptTooLong, 20, &["400"]),
    (HttpOtherModel, 10, &["404"]),
    (HttpNoPath, 10, &["404"]),
    (HttpMethod, 10, &["405"]),
    (Grpc, 150, &["OK", "RESOURCE_EXHAUSTED"]),
    (GrpcConnect, 10, &["OK", "RESOURCE_EXHAUSTED"]),
    (GrpcCancel, 60, &["OK", "RESOURCE_EXHAUSTED", "left"]),
    (GrpcDisconnect, 10, &["OK", "RESOURCE_EXHAUSTED", "left"]),
    // A client's own clock may end it first, which it calls cancelled.
    (
        GrpcDeadline,
        60,
        &["OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"],
    ),
    (GrpcPromptTooLong, 20, &["INVALID_ARGUMENT"]),
    (GrpcOtherToken, 20, &["INVALID_ARGUMENT"]),
    (GrpcTemperature, 20, &["INVALID_ARGUMENT"]),
    (GrpcStopNotUtf8, 20, &["INVALID_ARGUMENT"]),
    (GrpcNoPrompt, 20, &["INVALID_ARGUMENT"]),
    // The transport's word, before the message is decoded.
    (GrpcOverLong, 4, &["OUT_OF_RANGE"]),
];

impl Kind {
    /// A kind by its weight.
    pub fn draw(random: &mut Random) -> Self {
        let mut left = random.below(MIX.iter().map(|(_, weight, _)| weight).sum());
        for (kind, weight, _) in MIX {
            match left.checked_sub(weight) {
                Some(rest) => left = rest,
                None => return kind,
            }
        }
        unreachable!("weights sum to more")
    }

    /// What it may get.
    pub fn codes(self) -> &'static [&'static str] {
        let row = MIX.iter().find(|(kind, ..)| *kind == self);
        row.map_or(&[], |(.., codes)| codes)
    }
}
