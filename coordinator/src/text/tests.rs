mod chat;
mod decode;
mod tokenizer;
