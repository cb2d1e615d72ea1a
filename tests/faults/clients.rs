//! Clients of the rack: what they ask, what came and when, and whether it is right.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use secondwind_proto::v1::{self, generate_request::Prompt};
use tokio::{sync::watch, task::JoinHandle};
use tonic::{Code, Status};

use crate::{
    rack::{PATIENCE, Rack},
    random::Random,
};

/// Tokens of every answer.
const ANSWER_TOKENS: u32 = 96;
/// Where the best two tokens are closer than this in log-probability, another plan may choose the other.
const MARGIN: f32 = 1e-2;

/// What is asked: greedy ones and one that draws, short prompts and long ones.
pub fn questions() -> Vec<v1::GenerateRequest> {
    let mut random = Random::new(0, 0);
    [(12, 0.0), (300, 0.0), (40, 0.9), (120, 0.0)]
        .into_iter()
        .map(|(prompt_tokens, temperature)| v1::GenerateRequest {
            prompt: Some(Prompt::TokenIds(v1::TokenIdsPrompt {
                ids: random.tokens(prompt_tokens),
            })),
            max_tokens: Some(ANSWER_TOKENS),
            temperature: Some(temperature),
            seed: Some(7),
            ignore_eos: true,
            ..Default::default()
        })
        .collect()
}

/// How an answer ended.
pub struct Ended {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// When each response with tokens came.
    pub came: Vec<Instant>,
    /// The last word.
    pub finish: Result<v1::Finish, Status>,
}

/// Somebody who waits for an answer.
pub struct Asking {
    /// Tokens so far.
    pub tokens: watch::Receiver<usize>,
    ending: JoinHandle<Ended>,
}

impl Asking {
    pub fn start(rack: &Rack, request: v1::GenerateRequest) -> Self {
        let mut client = rack.client();
        let (count, tokens) = watch::channel(0);
        let ending = tokio::spawn(async move {
            let (mut tokens, mut came) = (Vec::new(), Vec::new());
            let mut stream = match client.generate(request).await {
                Ok(response) => response.into_inner(),
                Err(status) => {
                    return Ended {
                        tokens,
                        came,
                        finish: Err(status),
                    };
                }
            };
            let mut finish = Err(Status::data_loss("the stream ended without a finish"));
            loop {
                match stream.message().await {
                    Ok(None) => break,
                    Ok(Some(response)) => {
                        if !response.token_ids.is_empty() {
                            tokens.extend(response.token_ids);
                            came.push(Instant::now());
                            count.send_replace(tokens.len());
                        }
                        if let Some(end) = response.finish {
                            finish = Ok(end);
                        }
                    }
                    Err(status) => {
                        finish = Err(status);
                        break;
                    }
                }
            }
            Ended {
                tokens,
                came,
                finish,
            }
        });
        Self { tokens, ending }
    }

    pub async fn end(self) -> Result<Ended> {
        let ended = tokio::time::timeout(PATIENCE, self.ending).await;
        Ok(ended.with_context(|| format!("no end of an answer within {PATIENCE:?}"))??)
    }
}

/// Asks everything of an undisturbed rack.
pub async fn undisturbed(rack: &Rack) -> Result<Vec<Vec<u32>>> {
    let asking: Vec<Asking> = questions()
        .into_iter()
        .map(|request| Asking::start(rack, request))
        .collect();
    let mut answers = Vec::new();
    for asking in asking {
        let ended = asking.end().await?;
        ended.finish?;
        ensure!(
            ended.tokens.len() == ANSWER_TOKENS as usize,
            "a short answer"
        );
        answers.push(ended.tokens);
    }
    Ok(answers)
}

/// An answer came whole, or the coordinator was killed and says so. The tokens that came are the undisturbed ones.
pub fn check(ended: &Ended, undisturbed: &[u32], coordinator_killed: bool) -> Result<()> {
    let same = ended
        .tokens
        .iter()
        .zip(undisturbed)
        .take_while(|(a, b)| a == b)
        .count();
    ensure!(
        same == ended.tokens.len(),
        "token {same} is {:?}, without a fault it is {:?}",
        ended.tokens.get(same),
        undisturbed.get(same)
    );
    match &ended.finish {
        Ok(finish) => {
            let told = finish.usage.as_ref().map(|usage| usage.completion_tokens);
            ensure!(
                ended.tokens.len() == undisturbed.len() && told == Some(ANSWER_TOKENS),
                "an answer of {} tokens, told as {told:?}, instead of {}",
                ended.tokens.len(),
                undisturbed.len()
            );
            Ok(())
        }
        // A connection that breaks within an answer is told by the client's own library, as UNKNOWN.
        Err(status)
            if coordinator_killed && matches!(status.code(), Code::Unavailable | Code::Unknown) =>
        {
            Ok(())
        }
        Err(status) => bail!("an accepted request was lost: {status:?}"),
    }
}

/// Every greedy token is the model's own choice after what stands before it, wherever that is clear.
pub async fn follows_itself(
    rack: &Rack,
    request: &v1::GenerateRequest,
    answer: &[u32],
) -> Result<()> {
    let Some(Prompt::TokenIds(prompt)) = &request.prompt else {
        bail!("a prompt of token ids is needed");
    };
    let begin = prompt.ids.len();
    let ids = [&prompt.ids[..], answer].concat();
    let scoring = v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIdsPrompt { ids })),
        max_tokens: Some(0),
        prompt_logprobs: true,
        logprobs: Some(2),
        ..Default::default()
    };
    let mut stream = rack.client().generate(scoring).await?.into_inner();
    let mut top = Vec::new();
    while let Some(response) = stream.message().await? {
        top.extend(response.prompt.into_iter().flat_map(|prompt| prompt.top));
    }
    // The first token of a prompt has no place in the list.
    let places = top.get(begin - 1..).unwrap_or_default();
    ensure!(
        places.len() == answer.len(),
        "{} places were scored of {}",
        places.len(),
        answer.len()
    );
    for (index, (likely, token)) in places.iter().zip(answer).enumerate() {
        let [best, second] = likely.logprobs[..] else {
            bail!("no two likely tokens at {index}");
        };
        ensure!(
            likely.token_ids[0] == *token || best - second <= MARGIN,
            "token {index} is {token}, the model's choice is {likely:?}"
        );
    }
    Ok(())
}

/// From `over` to the next token of the answer that waited longest; `None` if all had ended by then.
pub fn waited(ended: &[Ended], over: Instant) -> Option<Duration> {
    let next = ended
        .iter()
        .filter_map(|ended| ended.came.iter().find(|&&at| at > over));
    next.map(|&at| at - over).max()
}
