//! `secondwind generate`: one answer of a running coordinator.

use anyhow::Result;
use clap::Args;

use crate::{
    cli::Common,
    client::{
        Client, DEFAULT_ENDPOINT, answer::Answer, flags::GenerationFlags, group::Plan, show::Show,
    },
    exit::UsageError,
    output,
};

/// Flags of `generate`.
#[derive(Args, Debug)]
pub struct Flags {
    /// The coordinator's client address
    #[arg(long, value_name = "URL", default_value = DEFAULT_ENDPOINT)]
    endpoint: String,
    #[command(flatten)]
    generation: GenerationFlags,
}

/// Where the words around an answer go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notes {
    /// Standard error: standard output is the answer alone.
    Stderr,
    /// Standard output: the command shows something off.
    Stdout,
}

impl Notes {
    /// Says `text`.
    pub fn say(self, text: &str) -> Result<()> {
        match self {
            Self::Stdout => output::print_line(text),
            Self::Stderr => {
                output::note(text);
                Ok(())
            }
        }
    }
}

/// Runs the command.
pub async fn run(flags: Flags, common: Common) -> Result<()> {
    common.start_logging()?;
    if flags.generation.prompt.is_none() && flags.generation.token_ids.is_none() {
        return Err(
            UsageError::one("nothing to answer: give --prompt TEXT or --token-ids IDS").into(),
        );
    }
    let mut client = Client::connect(&flags.endpoint).await?;
    let plan = plan(&mut client).await?;
    answer(&mut client, &flags.generation, plan, Notes::Stderr).await
}

/// What the coordinator says of its model.
pub struct Served {
    has_chat_template: bool,
    /// Absent while no group serves.
    pub plan: Option<Plan>,
}

/// Asks the coordinator what it serves.
pub async fn plan(client: &mut Client) -> Result<Served> {
    let model = client.model().await?;
    let plan = model
        .group
        .map(|group| Plan::new(&model.name, model.max_context_tokens, group));
    Ok(Served {
        has_chat_template: model.has_chat_template,
        plan,
    })
}

/// Generates one answer and prints it as the flags say. `demo` and `generate` both end here.
pub async fn answer(
    client: &mut Client,
    flags: &GenerationFlags,
    served: Served,
    notes: Notes,
) -> Result<()> {
    let request = flags.request(served.has_chat_template)?;
    let stream = client.generate(request.clone()).await?;
    let mut show = Show::default();
    let answer = Answer::receive(stream, &request, served.plan, |piece| match flags.json {
        true => Ok(()),
        false => show.piece(piece),
    })
    .await;
    if flags.json {
        let answer = answer?;
        output::note(&answer.summary());
        return output::print_line(&serde_json::to_string(&answer)?);
    }
    // An answer that breaks off leaves the cursor in the middle of a line.
    if show.answered || answer.is_ok() {
        output::print("\n")?;
    }
    let answer = answer?;
    for line in answer.call_lines().chain(answer.logprob_lines()) {
        output::note(&line);
    }
    notes.say(&answer.summary())
}
