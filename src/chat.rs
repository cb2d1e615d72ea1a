//! `secondwind chat`: a conversation with a running coordinator, line by line.

use anyhow::{Context, Result};
use clap::Args;
use rustyline::{DefaultEditor, error::ReadlineError};
use secondwind_proto::v1::{ChatMessage, ChatPrompt, generate_request::Prompt};

use crate::{
    cli::Common,
    client::{
        Client, DEFAULT_ENDPOINT,
        answer::Answer,
        error::RequestError,
        flags::{SamplingFlags, message},
        show::Show,
    },
    exit::{StdoutClosed, UsageError},
    output,
};

/// Flags of `chat`.
#[derive(Args, Debug)]
pub struct Flags {
    /// The coordinator's client address
    #[arg(long, value_name = "URL", default_value = DEFAULT_ENDPOINT)]
    endpoint: String,
    /// System message of the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingFlags,
}

/// What the user typed.
enum Line {
    Say(String),
    Reset,
    Help,
    Nothing,
    /// Ctrl-C at the prompt.
    Interrupt,
    Quit,
}

/// Runs the command.
pub async fn run(flags: Flags, common: Common) -> Result<()> {
    common.start_logging()?;
    let mut client = Client::connect(&flags.endpoint).await?;
    let model = client.model().await?;
    if !model.has_chat_template {
        let message =
            "this model has no chat template; use `secondwind generate --raw --prompt TEXT`";
        return Err(UsageError::one(message).into());
    }
    output::note(&format!(
        "{}; /reset forgets the conversation, /quit or Ctrl-D ends it",
        model.name
    ));
    let opening: Vec<ChatMessage> = flags
        .system
        .iter()
        .map(|system| message("system", system.clone()))
        .collect();
    let mut conversation = opening.clone();
    let mut editor = Some(DefaultEditor::new().context("cannot read from this terminal")?);
    let mut interrupted = false;
    loop {
        let line = read_line(&mut editor).await?;
        let again = std::mem::replace(&mut interrupted, matches!(line, Line::Interrupt));
        match line {
            Line::Quit => return Ok(()),
            Line::Interrupt if again => return Ok(()),
            Line::Interrupt => output::note("Ctrl-C again quits"),
            Line::Nothing => {}
            Line::Help => {
                output::note("no such command; /reset forgets the conversation, /quit ends it")
            }
            Line::Reset => {
                conversation.clone_from(&opening);
                output::note("forgotten");
            }
            Line::Say(text) => {
                conversation.push(message("user", text));
                match reply(&mut client, &conversation, &flags.sampling).await {
                    Ok(Some(answer)) => conversation.push(ChatMessage {
                        // Templates know which of it the model is to see again.
                        reasoning_content: answer.reasoning,
                        ..message("assistant", answer.text)
                    }),
                    Ok(None) => {
                        conversation.pop();
                        interrupted = true;
                        output::note("cancelled; Ctrl-C again quits");
                    }
                    Err(error) if error.is::<StdoutClosed>() => return Err(error),
                    // A refused message is forgotten; the conversation goes on.
                    Err(error) if error.is::<RequestError>() => {
                        conversation.pop();
                        output::note(&format!("error: {error:#}"));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

/// Streams the answer; `None` when Ctrl-C cancelled it.
async fn reply(
    client: &mut Client,
    conversation: &[ChatMessage],
    sampling: &SamplingFlags,
) -> Result<Option<Answer>> {
    let prompt = ChatPrompt {
        messages: conversation.to_vec(),
        ..ChatPrompt::default()
    };
    let request = sampling.request(Prompt::Chat(prompt));
    let answer = async {
        let stream = client.generate(request.clone()).await?;
        let mut show = Show::default();
        Answer::receive(stream, &request, None, |piece| show.piece(piece)).await
    };
    let answer = tokio::select! {
        answer = answer => Some(answer),
        interrupt = tokio::signal::ctrl_c() => {
            interrupt.context("cannot listen for Ctrl-C")?;
            None
        }
    };
    output::print("\n")?;
    let Some(answer) = answer.transpose()? else {
        return Ok(None);
    };
    for line in answer.call_lines() {
        output::note(&line);
    }
    output::note(&answer.summary());
    Ok(Some(answer))
}

/// Reads on a thread of its own, for the editor blocks. Ctrl-C counts also where the terminal is not in
/// raw mode.
async fn read_line(editor: &mut Option<DefaultEditor>) -> Result<Line> {
    let mut reading = editor.take().context("the line editor is still reading")?;
    let read = tokio::task::spawn_blocking(move || {
        let line = reading.readline("> ");
        if let Ok(line) = &line {
            // An entry that history refuses is only not offered again.
            let _ = reading.add_history_entry(line);
        }
        (reading, line)
    });
    let (reading, line) = tokio::select! {
        read = read => read.context("the line editor failed")?,
        _ = tokio::signal::ctrl_c() => return Ok(Line::Quit),
    };
    *editor = Some(reading);
    match line {
        Ok(line) => Ok(match line.trim() {
            "" => Line::Nothing,
            "/quit" | "/exit" => Line::Quit,
            "/reset" => Line::Reset,
            command if command.starts_with('/') => Line::Help,
            _ => Line::Say(line),
        }),
        Err(ReadlineError::Interrupted) => Ok(Line::Interrupt),
        Err(ReadlineError::Eof) => Ok(Line::Quit),
        Err(error) => Err(error).context("cannot read a line"),
    }
}
