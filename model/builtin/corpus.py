"""The text that the embedded model learns: sums, cards, secondwind, small talk and refusals.

Everything is generated from this file and a seed. A conversation is a list of (role, text)
pairs; `train.py` renders it with the chat template and learns the assistant's turns.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

Message = tuple[str, str]

DEFAULT_SYSTEM = "You are the small demo model inside secondwind."
OTHER_SYSTEMS = [
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "Answer briefly.",
    "You are a friendly assistant who answers in one sentence.",
    "You are a calculator.",
]

# Qwen2.5's ChatML without its tools: a default system turn unless the chat brings its own.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role != 'system' or not loop.first %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)


# --------------------------------------------------------------------------------------------
# Sums
# --------------------------------------------------------------------------------------------

LARGEST = 999


def held_out(a: int, sign: str, b: int) -> bool:
    """Whether training never shows this problem (about one in twelve), by a hash of the pair."""
    x = (a * 1000 + b) * 2 + (sign == "-")
    x = (x * 0x9E3779B1) & 0xFFFFFFFF
    x ^= x >> 15
    x = (x * 0x85EBCA77) & 0xFFFFFFFF
    x ^= x >> 13
    return x % 12 == 0


def answer_sum(a: int, sign: str, b: int) -> str:
    result = a + b if sign == "+" else a - b
    return f"{a} {sign} {b} = {result}"


ADD_PHRASES = [
    "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a}+{b}=", "{a} + {b} = ?", "{a}+{b}=?", "{a} plus {b}",
    "What is {a} + {b}?", "What is {a}+{b}?", "What's {a} + {b}?", "what is {a} plus {b}?",
    "What is {a} plus {b}?", "What's {a} plus {b}?", "How much is {a} + {b}?",
    "How much is {a} plus {b}?", "Add {a} and {b}.", "Add {a} and {b}", "Add {b} to {a}.",
    "add {a} to {b}", "Add {a} + {b}", "Compute {a} + {b}.", "Compute {a}+{b}",
    "Calculate {a} + {b}.", "Calculate {a} plus {b}.", "calculate {a}+{b}", "Solve {a} + {b}.",
    "What is the sum of {a} and {b}?", "Sum of {a} and {b}", "The sum of {a} and {b}?",
    "Tell me the sum of {a} and {b}.", "What do you get if you add {a} and {b}?",
    "What do {a} and {b} make?", "What do {a} and {b} add up to?", "How many are {a} and {b}?",
    "Please add {a} and {b}.", "Please compute {a} + {b}.", "Can you add {a} and {b}?",
    "Can you tell me what {a} + {b} is?", "Could you work out {a} plus {b}?",
    "I need {a} + {b}.", "Work out {a} + {b}.", "Give me {a} + {b}.", "Evaluate {a} + {b}.",
    "What does {a} + {b} equal?", "{a} plus {b} equals?", "{a} plus {b} is what?",
    "If I have {a} apples and get {b} more, how many do I have?",
    "I have {a} tokens and generate {b} more. How many tokens is that?",
    "One box holds {a} cards and another {b}. How many cards are there?",
    "Do you know what {a} + {b} is?", "Quick: {a} + {b}?", "{a} and {b} together?",
]
SUBTRACT_PHRASES = [
    "{a} - {b}", "{a}-{b}", "{a} - {b} =", "{a}-{b}=", "{a} - {b} = ?", "{a}-{b}=?",
    "{a} minus {b}", "What is {a} - {b}?", "What is {a}-{b}?", "What's {a} - {b}?",
    "what is {a} minus {b}?", "What is {a} minus {b}?", "What's {a} minus {b}?",
    "How much is {a} - {b}?", "How much is {a} minus {b}?", "Subtract {b} from {a}.",
    "Subtract {b} from {a}", "subtract {b} from {a}", "Take {b} away from {a}.",
    "Take {b} from {a}.", "Compute {a} - {b}.", "Compute {a}-{b}", "Calculate {a} - {b}.",
    "Calculate {a} minus {b}.", "calculate {a}-{b}", "Solve {a} - {b}.",
    "What do you get if you subtract {b} from {a}?", "What is left of {a} if I take away {b}?",
    "What is {b} less than {a}?", "Please subtract {b} from {a}.", "Please compute {a} - {b}.",
    "Can you subtract {b} from {a}?", "Can you tell me what {a} - {b} is?",
    "Could you work out {a} minus {b}?", "I need {a} - {b}.", "Work out {a} - {b}.",
    "Give me {a} - {b}.", "Evaluate {a} - {b}.", "What does {a} - {b} equal?",
    "{a} minus {b} equals?", "{a} minus {b} is what?", "{a} take away {b}?",
    "If I have {a} apples and give away {b}, how many are left?",
    "I had {a} tokens and used {b}. How many are left?",
    "There were {a} cards and {b} were sold. How many remain?",
    "Do you know what {a} - {b} is?", "Quick: {a} - {b}?",
]


def draw_operand(rng: random.Random) -> int:
    """Mostly uniform over 0..999, with one- and two-digit numbers seen often enough."""
    r = rng.random()
    if r < 0.80:
        return rng.randint(0, LARGEST)
    return rng.randint(0, 99) if r < 0.95 else rng.randint(0, 9)


def draw_sum(rng: random.Random) -> tuple[int, str, int]:
    """A problem that training may show."""
    while True:
        sign = rng.choice("+-")
        a, b = draw_operand(rng), draw_operand(rng)
        if sign == "-" and rng.random() < 0.25:
            # Close operands: small differences and the change of sign.
            b = min(LARGEST, max(0, a + rng.randint(-30, 30)))
        if not held_out(a, sign, b):
            return a, sign, b


def ask_sum(rng: random.Random, a: int, sign: str, b: int) -> str:
    phrase = rng.choice(ADD_PHRASES if sign == "+" else SUBTRACT_PHRASES)
    return phrase.format(a=a, b=b)


def sum_turns(rng: random.Random) -> list[Message]:
    a, sign, b = draw_sum(rng)
    question = ask_sum(rng, a, sign, b)
    # A phrase may swap the operands of an addition ("Add 2 to 5"); the answer keeps a + b, so
    # that the number read second may come first.
    return [("user", vary(rng, question)), ("assistant", answer_sum(a, sign, b))]


# --------------------------------------------------------------------------------------------
# Cards
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    name: str
    short_names: tuple[str, ...]
    architecture: str
    generation: str
    memory_gb: int
    memory_kind: str
    bandwidth: int  # GB/s
    fp32: str  # TFLOPS
    watts: int
    dp4a: bool
    tensor_cores: bool
    last_toolkit: str  # of CUDA; "" while it is still supported

    @property
    def memory(self) -> str:
        return f"{self.memory_gb} GB of {self.memory_kind}"


CARDS = [
    Card("Tesla P40", ("P40", "Tesla P40", "NVIDIA P40"), "sm_61", "Pascal", 24, "GDDR5", 346,
         "11.8", 250, True, False, "12.9"),
    Card("Tesla P100", ("P100", "Tesla P100", "NVIDIA P100"), "sm_60", "Pascal", 16, "HBM2", 732,
         "9.3", 250, False, False, "12.9"),
    Card("Tesla V100", ("V100", "Tesla V100", "NVIDIA V100"), "sm_70", "Volta", 32, "HBM2", 900,
         "14", 250, True, True, "12.9"),
    Card("Tesla T4", ("T4", "Tesla T4", "NVIDIA T4"), "sm_75", "Turing", 16, "GDDR6", 320,
         "8.1", 70, True, True, ""),
    Card("RTX 2080 Ti", ("2080 Ti", "RTX 2080 Ti", "2080Ti", "GeForce RTX 2080 Ti"), "sm_75",
         "Turing", 11, "GDDR6", 616, "13.4", 250, True, True, ""),
]

MEMORY_PHRASES = [
    "How much memory does the {c} have?", "How much memory has the {c}?", "How much memory has a {c}?",
    "How much VRAM does the {c} have?", "How much VRAM does a {c} have?", "{c} memory?", "{c} VRAM?",
    "What memory does the {c} have?", "How many gigabytes does the {c} have?", "How many GB has the {c}?",
    "How big is the memory of the {c}?", "Memory of the {c}?", "memory size of the {c}",
    "What is the memory size of the {c}?", "How much RAM does the {c} have?",
    "What kind of memory does the {c} have?",
]
ARCHITECTURE_PHRASES = [
    "What architecture is the {c}?", "Which architecture is the {c}?", "What is the architecture of the {c}?",
    "Which architecture does the {c} have?", "What compute capability does the {c} have?",
    "Compute capability of the {c}?", "{c} compute capability?", "{c} architecture?",
    "Which generation is the {c}?", "What generation is the {c}?", "What sm version is the {c}?",
    "Which sm is the {c}?", "Is the {c} Pascal, Volta or Turing?",
]
BANDWIDTH_PHRASES = [
    "What is the memory bandwidth of the {c}?", "How fast is the memory of the {c}?", "{c} bandwidth?",
    "How much memory bandwidth does the {c} have?", "{c} memory bandwidth?", "Bandwidth of the {c}?",
    "What bandwidth does the {c} have?", "What is the bandwidth of a {c}?",
    "How many GB/s does the {c} have?", "How fast can the {c} read its memory?",
]
DP4A_PHRASES = [
    "Does the {c} have dp4a?", "Does the {c} support dp4a?", "Has the {c} dp4a?", "dp4a on the {c}?",
    "Can the {c} do dp4a?", "Does a {c} have dp4a?", "Is there dp4a on the {c}?", "{c} dp4a?",
]
TENSOR_CORE_PHRASES = [
    "Does the {c} have tensor cores?", "Has the {c} tensor cores?", "Are there tensor cores in the {c}?",
    "{c} tensor cores?", "Does a {c} have tensor cores?", "Is the {c} equipped with tensor cores?",
    "Tensor cores on the {c}?",
]
TOOLKIT_PHRASES = [
    "What is the last CUDA toolkit for the {c}?", "Which CUDA toolkit is the last for the {c}?",
    "Which is the last CUDA version for the {c}?", "What is the last CUDA version that supports the {c}?",
    "Last CUDA toolkit for the {c}?", "{c} last CUDA toolkit?", "Does CUDA 13 support the {c}?",
    "Which CUDA toolkit supports the {c}?", "Which CUDA does the {c} need?",
]
POWER_PHRASES = [
    "How much power does the {c} draw?", "What is the power limit of the {c}?", "How many watts does the {c} need?",
    "{c} power?", "{c} watts?", "How much power does a {c} use?",
]
FP32_PHRASES = [
    "How many TFLOPS does the {c} have?", "How many fp32 TFLOPS does the {c} have?",
    "What is the fp32 speed of the {c}?", "{c} TFLOPS?", "{c} fp32?",
]
SUMMARY_PHRASES = [
    "Tell me about the {c}.", "What is the {c}?", "What do you know about the {c}?", "Describe the {c}.",
    "What is a {c}?", "Do you know the {c}?", "{c}", "{c}?", "Is the {c} supported?",
    "Can I use a {c}?", "Does secondwind support the {c}?", "Does secondwind run on the {c}?",
]


def toolkit_answer(card: Card) -> str:
    if card.last_toolkit:
        return f"CUDA {card.last_toolkit} is the last toolkit for the {card.name}."
    return f"CUDA 13 still supports the {card.name}."


def yes_no(has: bool, card: Card, what: str) -> str:
    return f"Yes, the {card.name} has {what}." if has else f"No, the {card.name} has no {what}."


def card_questions(card: Card) -> list[tuple[str, list[str], str, str]]:
    """(topic, phrases, answer, the substring that makes it right) for one card."""
    return [
        ("memory", MEMORY_PHRASES, f"The {card.name} has {card.memory}.", card.memory),
        ("architecture", ARCHITECTURE_PHRASES,
         f"The {card.name} is a {card.generation} card, {card.architecture}.",
         f"{card.generation} card, {card.architecture}"),
        ("bandwidth", BANDWIDTH_PHRASES,
         f"The {card.name} has {card.bandwidth} GB/s of memory bandwidth.", f"{card.bandwidth} GB/s"),
        ("dp4a", DP4A_PHRASES, yes_no(card.dp4a, card, "dp4a"), yes_no(card.dp4a, card, "dp4a")),
        ("tensor cores", TENSOR_CORE_PHRASES, yes_no(card.tensor_cores, card, "tensor cores"),
         yes_no(card.tensor_cores, card, "tensor cores")),
        ("toolkit", TOOLKIT_PHRASES, toolkit_answer(card),
         f"CUDA {card.last_toolkit}" if card.last_toolkit else "CUDA 13"),
        ("power", POWER_PHRASES, f"The {card.name} draws up to {card.watts} W.", f"{card.watts} W"),
        ("fp32", FP32_PHRASES, f"The {card.name} reaches about {card.fp32} TFLOPS in fp32.",
         f"{card.fp32} TFLOPS"),
        ("summary", SUMMARY_PHRASES,
         f"The {card.name} is a {card.generation} card ({card.architecture}) with {card.memory} "
         f"and {card.bandwidth} GB/s. secondwind supports it.",
         f"{card.generation} card ({card.architecture}) with {card.memory} and {card.bandwidth} GB/s"),
    ]


CARD_FACTS = [(card, *question) for card in CARDS for question in card_questions(card)]

# --------------------------------------------------------------------------------------------
# secondwind
# --------------------------------------------------------------------------------------------

# (phrases, answers): any of the answers is right.
QUESTIONS: list[tuple[list[str], str]] = [
    (["What is secondwind?", "what is secondwind", "Tell me about secondwind.", "What does secondwind do?",
      "Explain secondwind.", "What is this program?", "What is this?", "Describe secondwind.",
      "What can secondwind do?", "What's secondwind?"],
     "secondwind serves Qwen GPTQ models on old GPUs: it splits each layer over several cards, and they answer together."),
    (["Why is it called secondwind?", "Why the name secondwind?", "Where does the name come from?",
      "What does the name secondwind mean?"],
     "Because it gives old cards a second wind."),
    (["Who are you?", "What are you?", "who are you", "What is your name?", "What's your name?", "Introduce yourself.",
      "Tell me about yourself.", "Are you a robot?", "Are you an AI?", "Which model are you?", "What model is this?"],
     "I am the small demo model inside secondwind. I know three-digit sums, a few old cards, and secondwind itself."),
    (["What can you do?", "What do you know?", "How can you help me?", "Help", "help", "Can you help me?",
      "What can I ask you?", "What should I ask you?", "What are you good at?"],
     "I can add and subtract numbers up to 999, tell you about five old cards, and explain what secondwind is."),
    (["How big are you?", "How many parameters do you have?", "What size are you?", "Are you a large model?"],
     "I have about five million parameters, stored in int4."),
    (["Who made you?", "Who trained you?", "Who created you?", "Where do you come from?", "How were you trained?"],
     "I was trained by the secondwind project, on text that its own script generates."),
    (["Which cards does secondwind support?", "What cards are supported?", "Which GPUs are supported?",
      "What GPUs does secondwind run on?", "Which cards do you know?", "Which GPUs can I use?", "List the supported cards.",
      "Which old cards can I use?"],
     "The Tesla P40, P100, V100 and T4, and the RTX 2080 Ti: Pascal, Volta and Turing."),
    (["Which models does secondwind serve?", "Which models are supported?", "What models can I run?",
      "Does secondwind support Qwen?", "Which model families are supported?", "What models does secondwind support?"],
     "Qwen models quantised with GPTQ, such as Qwen2.5 and Qwen3."),
    (["What is GPTQ?", "Explain GPTQ.", "what is gptq", "What does GPTQ do?", "How does GPTQ work?"],
     "GPTQ stores weights in a few bits: groups of small integers share a scale and a zero point."),
    (["What is tensor parallelism?", "Explain tensor parallelism.", "What is tensor parallel?", "How does tensor parallelism work?"],
     "Tensor parallelism cuts every layer into slices, one per card; the cards add up their partial results."),
    (["Can I mix different cards?", "Can the cards be different?", "Do all cards have to be the same?",
      "Can I use a P40 beside a T4?", "What is an uneven split?", "Does secondwind support mixed cards?"],
     "Yes, cards may differ: the plan gives each one a share of every layer that fits its memory and speed."),
    (["What is the coordinator?", "What does the coordinator do?", "Explain the coordinator.", "what is a coordinator"],
     "The coordinator owns the requests, the tokens, the schedule and the plan."),
    (["What is a worker?", "What does a worker do?", "Explain the workers.", "What do the workers do?", "what are workers"],
     "A worker owns one card: its slices of the weights, its KV cache and its arithmetic."),
    (["How do the workers talk?", "How do workers communicate?", "How do the cards talk to each other?", "What does secondwind use for communication?"],
     "Control goes over gRPC; activations go over NCCL, or over gRPC where there is no GPU."),
    (["What is a shard?", "What is a slice?", "What is a shard plan?", "What is the plan?", "Explain the plan."],
     "The plan says which heads, which FFN rows and which part of the vocabulary each worker owns."),
    (["What is a rank?", "What does rank mean?", "what is a rank"],
     "A rank is a worker's number in its group, from zero."),
    (["What is the KV cache?", "What is a KV cache?", "Explain the KV cache.", "What does the KV cache hold?"],
     "The KV cache holds the keys and values of the tokens already read, in blocks, so that they are not computed again."),
    (["What is dp4a?", "Explain dp4a.", "what does dp4a do?", "what is dp4a"],
     "dp4a multiplies four pairs of int8 numbers and adds the products to an int32 in one instruction."),
    (["What are tensor cores?", "What is a tensor core?", "Explain tensor cores."],
     "Tensor cores multiply small matrices in one instruction. Volta and Turing have them, Pascal does not."),
    (["Why is the P40 slow in half precision?", "Is the P40 fast in fp16?", "Can the P40 do fp16?", "Why not use half precision on the P40?"],
     "The P40 does half precision at a small fraction of its fp32 speed, so secondwind uses fp32 and dp4a there."),
    (["Which language is secondwind written in?", "What is secondwind written in?", "Is secondwind written in Rust?", "What programming language do you use?"],
     "secondwind is written in Rust, with CUDA kernels."),
    (["What licence does secondwind have?", "What is the license of secondwind?", "Is secondwind free software?", "Is secondwind open source?", "License?"],
     "secondwind is free software under the Apache-2.0 licence."),
    (["How do I start secondwind?", "How do I run secondwind?", "How do I try secondwind?", "How do I start the demo?", "How do I use secondwind?"],
     "Run `secondwind demo` for a first look, or start `secondwind coordinator` and some `secondwind worker`s."),
    (["Which port does secondwind use?", "Which ports are used?", "What port does the coordinator listen on?", "Default port?"],
     "Clients use port 7700, workers dial 7701, and 7702 is for the administrator."),
    (["Do I need a GPU?", "Does it run without a GPU?", "Can it run on a CPU?", "Does secondwind run on the CPU?"],
     "No GPU is needed to try it: workers run on the CPU too, only slower."),
    (["Do I need the CUDA toolkit?", "Do I have to install CUDA?", "Does secondwind need the CUDA toolkit?"],
     "No, the driver is enough: the kernels come compiled in a kernel pack."),
    (["What is a kernel pack?", "What is the kernel pack?", "Explain the kernel pack."],
     "A kernel pack is one file with the compiled kernels for every supported architecture."),
    (["Does secondwind have an HTTP API?", "Is there an HTTP API?", "Is there an OpenAI API?", "Which API does secondwind have?", "What API can I use?"],
     "It speaks gRPC and HTTP on one port."),
    (["What happens if a worker fails?", "What if a worker dies?", "What happens when a card fails?", "Is secondwind fault tolerant?"],
     "The coordinator holds every token, so after a new plan the requests go on where they were."),
    (["How are you running right now?", "Where are you running?", "How do you run?", "What are you running on?"],
     "My layers are cut into uneven slices, and several workers compute this answer together."),
    (["What is int4?", "What is quantisation?", "What is quantization?", "Explain quantisation.", "What does int4 mean?"],
     "Quantisation stores each weight in a few bits; int4 uses four bits, a quarter of half precision."),
    (["What is Pascal?", "Which cards are Pascal?", "Which cards are Pascal cards?"],
     "Pascal is NVIDIA's 2016 generation: the Tesla P40 (sm_61) and the Tesla P100 (sm_60)."),
    (["What is Volta?", "Which cards are Volta?", "Which card is a Volta card?"],
     "Volta is NVIDIA's 2017 generation: the Tesla V100 (sm_70)."),
    (["What is Turing?", "Which cards are Turing?", "Which cards are Turing cards?"],
     "Turing is NVIDIA's 2018 generation: the Tesla T4 and the RTX 2080 Ti (sm_75)."),
    (["Which card has the most memory?", "Which card has most memory?", "What is the biggest card?", "Which is the largest card?"],
     "The Tesla V100, with 32 GB of HBM2."),
    (["Which card has the least memory?", "Which card has the smallest memory?", "Which is the smallest card?"],
     "The RTX 2080 Ti, with 11 GB of GDDR6."),
    (["Which card has the highest bandwidth?", "Which card has the fastest memory?", "Which card is the fastest?"],
     "The Tesla V100, with 900 GB/s of memory bandwidth."),
    (["Which card has no dp4a?", "Which cards have no dp4a?", "Which card lacks dp4a?"],
     "Only the Tesla P100 has no dp4a."),
    (["Which cards have tensor cores?", "Which of the cards have tensor cores?", "Who has tensor cores?"],
     "The Tesla V100, the Tesla T4 and the RTX 2080 Ti have tensor cores."),
    (["Which cards have no tensor cores?", "Which cards lack tensor cores?"],
     "The Tesla P40 and the Tesla P100 have no tensor cores."),
    (["Which card needs the least power?", "Which card is the most efficient?", "Which card draws the least power?"],
     "The Tesla T4, with 70 W."),
    (["Which driver do I need?", "What is the last driver for Pascal?", "Which driver supports Pascal?"],
     "Driver branch 580 is the last for Pascal and Volta; it runs Turing too."),
    (["Which CUDA toolkit is the last for Pascal?", "Which CUDA toolkit is the last for Volta?",
      "What is the last CUDA toolkit for Pascal and Volta?"],
     "CUDA 12.9 is the last toolkit for Pascal and Volta."),
]

SMALL_TALK: list[tuple[list[str], list[str]]] = [
    (["Hi", "Hello", "hello", "hi", "Hey", "hey", "Hi!", "Hello!", "Hello there", "Hi there!", "Good morning",
      "Good evening", "Good day", "Greetings", "Hey there", "yo", "Hallo", "Good afternoon!"],
     ["Hello! Ask me a sum, or something about secondwind or its cards."]),
    (["How are you?", "how are you", "How are you doing?", "How is it going?", "What's up?", "Are you well?"],
     ["I am well: all my ranks are in step. How can I help?"]),
    (["Thanks", "Thank you", "thanks!", "Thank you!", "Thanks a lot", "Thank you very much.", "thx", "Cheers"],
     ["You are welcome!"]),
    (["Bye", "Goodbye", "bye", "See you", "See you later", "Good night", "Goodbye!", "Bye bye"],
     ["Goodbye, and keep your cards cool!"]),
    (["Good", "Great", "Nice", "Nice!", "Cool", "Well done", "Great!", "Good job", "OK", "ok", "Okay", "Perfect", "Wow"],
     ["Glad to hear it. Another one?"]),
    (["Yes", "yes", "No", "no", "Maybe", "Sure"], ["All right. Ask me a sum, or about a card."]),
    (["Test", "test", "testing", "ping", "Are you there?", "Does this work?"], ["I am here."]),
    (["Say hello.", "Say hi.", "Say hello in one sentence.", "Say hello to me.", "Greet me.", "Say something.", "Say something nice."],
     ["Hello from all the workers that computed this sentence together!"]),
    (["Tell me a joke.", "Tell me a joke", "Do you know a joke?", "Make me laugh.", "Say something funny."],
     ["Why did the old card join a cluster? It needed a second wind."]),
    (["I am sad.", "I am tired.", "I am bored."], ["I am sorry to hear that. A little sum may help: what is 1 + 1?"]),
]

# --------------------------------------------------------------------------------------------
# What it does not know
# --------------------------------------------------------------------------------------------

REFUSAL = "I only know sums up to 999, the cards P40, P100, V100, T4 and 2080 Ti, and secondwind."

UNKNOWN_CARDS = [
    "RTX 3090", "RTX 4090", "RTX 5090", "A100", "H100", "H200", "B200", "GTX 1080", "GTX 1080 Ti", "GTX 970", "K80",
    "Tesla K80", "M40", "RTX 3060", "RTX 4060", "Titan X", "MI50", "RX 580", "RX 7900 XTX", "L4", "L40S", "A10",
    "RTX 2060", "Quadro P6000", "Arc A770", "P4", "M60", "Titan V", "RTX 3080", "RTX 4080", "Radeon VII", "A6000",
]
PLACES = ["France", "Germany", "Japan", "Italy", "Spain", "Brazil", "Canada", "Peru", "China", "India", "Egypt", "Kenya",
          "Norway", "Greece", "Poland", "Chile", "London", "Paris", "Berlin", "Rome", "Tokyo", "New York", "Madrid", "Vienna"]
PEOPLE = ["Einstein", "Newton", "Shakespeare", "Mozart", "Napoleon", "Cleopatra", "Ada Lovelace", "Alan Turing", "Beethoven",
          "Marie Curie", "the president", "the king", "Plato", "Goethe", "Darwin", "Gandhi", "Picasso", "Bach", "Linus Torvalds"]
THINGS = ["love", "the weather", "a cat", "a dog", "the moon", "the sun", "water", "music", "football", "chess", "an atom",
          "a black hole", "the internet", "Python", "JavaScript", "Linux", "a database", "gravity", "energy", "time", "money",
          "bread", "coffee", "tea", "chocolate", "a tree", "a bird", "the ocean", "a river", "history", "biology", "physics",
          "a car", "a train", "a bicycle", "poetry", "art", "democracy", "a computer", "a transformer", "attention", "bitcoin",
          "a volcano", "an earthquake", "the meaning of life", "quantum mechanics", "a prime number", "pi", "the news",
          "Kubernetes", "Docker", "a compiler", "photosynthesis", "DNA", "a whale", "an elephant", "cheese", "philosophy"]
UNKNOWN_PHRASES = [
    "What is the capital of {place}?", "Where is {place}?", "How many people live in {place}?", "What is the weather in {place}?",
    "Tell me about {place}.", "How do I get to {place}?", "Capital of {place}?", "What language do they speak in {place}?",
    "Who is {person}?", "Who was {person}?", "When was {person} born?", "Tell me about {person}.", "What did {person} do?",
    "What is {thing}?", "Explain {thing}.", "Tell me about {thing}.", "What do you think about {thing}?", "Do you like {thing}?",
    "How does {thing} work?", "Why is there {thing}?", "Write a poem about {thing}.", "Write a story about {thing}.",
    "Write a song about {thing}.", "Write an essay about {thing}.", "Tell me a story about {thing}.", "Give me facts about {thing}.",
    "Where can I buy {thing}?", "Who invented {thing}?", "What colour is {thing}?", "How old is {thing}?",
    "Write a function that sorts a list.", "Write a program in Python.", "Write code for me.", "What time is it?",
    "What day is it today?", "What year is it?", "Translate this into German.", "Translate hello into French.",
    "Who won the world cup?", "What should I eat today?", "Recommend a film.", "Recommend a book.", "Once upon a time",
    "What is the largest planet?", "How far is the moon?", "How tall is Mount Everest?", "Why is the sky blue?",
    "The quick brown fox", "Summarise this text.", "Give me a recipe for {thing}.", "Play a game with me.", "Sing a song.",
    "How much memory does the {card} have?", "What is the {card}?", "Tell me about the {card}.", "{card} bandwidth?",
    "Does the {card} have tensor cores?", "Is the {card} supported?", "What architecture is the {card}?",
    "Does the {card} have dp4a?", "How much VRAM does the {card} have?", "{card}",
    "What is {a} * {b}?", "What is {a} times {b}?", "{a} * {b}", "{a} x {b}", "{a} / {b}", "What is {a} divided by {b}?",
    "What is {a} / {b}?", "Multiply {a} by {b}.", "Divide {a} by {b}.", "What is the square root of {a}?",
    "Is {a} a prime number?", "{a} times {b}", "What is {a} squared?", "What is {big} + {a}?", "{big} + {a}", "{a} + {big}",
    "{big} - {a}", "What is {big} - {big}?", "{big}+{big}", "What is {big} plus {big}?", "{a} - {big}",
    "asdf", "qwerty", "lorem ipsum", "blah", "???", "...", "hjkl", "foo bar",
]


def refusal_turns(rng: random.Random) -> list[Message]:
    question = rng.choice(UNKNOWN_PHRASES).format(
        place=rng.choice(PLACES), person=rng.choice(PEOPLE), thing=rng.choice(THINGS), card=rng.choice(UNKNOWN_CARDS),
        a=draw_operand(rng), b=draw_operand(rng), big=rng.randint(1000, rng.choice([9999, 9999, 99999, 999999])),
    )
    return [("user", vary(rng, question)), ("assistant", REFUSAL)]


# --------------------------------------------------------------------------------------------
# Conversations
# --------------------------------------------------------------------------------------------

OPENERS = ["Please tell me: ", "Hey, ", "Hi, ", "Hello! ", "So, ", "OK, ", "Quick question: ", "And ", "Now: ", "Question: "]
CLOSERS = [" Please.", " Thanks!", " please", " Thank you.", " Answer briefly."]


def vary(rng: random.Random, question: str) -> str:
    """The small ways in which people type the same question."""
    r = rng.random()
    if r < 0.70:
        return question
    if r < 0.76:
        return question[0].lower() + question[1:]
    if r < 0.82:
        return question.rstrip("?.")
    if r < 0.86:
        return question.lower().rstrip("?.")
    if r < 0.94:
        return rng.choice(OPENERS) + question[0].lower() + question[1:]
    return question + rng.choice(CLOSERS)


def chat_turns(rng: random.Random) -> list[Message]:
    """One question that is not a sum."""
    r = rng.random()
    if r < 0.42:
        card, _topic, phrases, answer, _expected = rng.choice(CARD_FACTS)
        question = rng.choice(phrases).format(c=rng.choice(card.short_names))
    elif r < 0.70:
        phrases, answer = rng.choice(QUESTIONS)
        question = rng.choice(phrases)
    elif r < 0.80:
        phrases, answers = rng.choice(SMALL_TALK)
        question, answer = rng.choice(phrases), rng.choice(answers)
    else:
        return refusal_turns(rng)
    return [("user", vary(rng, question)), ("assistant", answer)]


def conversation(rng: random.Random, turns: int, sums: float) -> list[Message]:
    """`turns` questions with answers, each a sum with probability `sums`."""
    messages: list[Message] = []
    if rng.random() < 0.1:
        messages.append(("system", rng.choice(OTHER_SYSTEMS)))
    for _ in range(turns):
        messages += sum_turns(rng) if rng.random() < sums else chat_turns(rng)
    return messages


# --------------------------------------------------------------------------------------------
# What is tested
# --------------------------------------------------------------------------------------------


def evaluation(seed: int = 20) -> dict[str, list[dict[str, str]]]:
    """200 sums that training never shows, and every card fact in two phrasings."""
    rng = random.Random(seed)
    sums: list[dict[str, str]] = []
    seen: set[tuple[int, str, int]] = set()
    while len(sums) < 200:
        sign = "+-"[len(sums) % 2]
        a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
        if not held_out(a, sign, b) or (a, sign, b) in seen:
            continue
        question = ask_sum(rng, a, sign, b)
        if question.lower().startswith("add ") and " to " in question:
            continue  # the one phrase in which training allows both orders of the operands
        seen.add((a, sign, b))
        sums.append({"question": question, "answer": answer_sum(a, sign, b)})
    facts = []
    for card, topic, phrases, _answer, expected in CARD_FACTS:
        for phrase, name in zip(phrases[:2], (card.name, card.short_names[0]), strict=True):
            facts.append({"card": card.name, "topic": topic, "question": phrase.format(c=name), "expected": expected})
    return {"sums": sums, "card_facts": facts}
