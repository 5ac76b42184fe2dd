"""Alignment by a vision-language model: in process against one image and one token at a time, and over HTTP."""

import base64
import contextlib
import io
import json
import pickle
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_texts
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, BertModel, LlavaForConditionalGeneration

from rftcore import rewards
from rftcore.rewards import RewardSpecError, vlm_client
from rftcore.rewards.vlm import Describer, _echoed
from rftcore.rewards.vlm_alignment import QUESTION, VlmAlignment, pictures
from rftcore.rewards.vlm_client import ChatServer
from rftcore.rewards.vlm_server import VlmServer, main

PROMPTS = ["a red cat", "a dog in the image", "the big horse"]
LAYER, TOKENS = 2, 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    return {
        "model": tiny_texts.save_vlm(tmp_path_factory.mktemp("llava")),
        "similarity": tiny_texts.save_encoder(tmp_path_factory.mktemp("bert")),
    }


@pytest.fixture(scope="module")
def describer(models):
    return Describer(models["model"], "fp32")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(3, 3, 20, 26, generator=generator) * torch.tensor([1.0, 0.3, 0.7]).view(3, 1, 1, 1)


@pytest.fixture(autouse=True)
def direct_connections(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def slow_answer(folder, image, question):
    """One image, by PIL, without a cache: the likeliest token after all that stands there, again and again."""
    processor, model = (
        AutoProcessor.from_pretrained(folder),
        LlavaForConditionalGeneration.from_pretrained(folder).eval(),
    )
    picture = Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    inputs = processor(images=picture, text=f"<image> {question} :", return_tensors="pt")
    ids, answer = inputs["input_ids"], []
    assert ids[0, 0] == processor.tokenizer.bos_token_id and (ids == processor.tokenizer.bos_token_id).sum() == 1
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"], use_cache=False
            ).logits
        answer.append(logits[0, -1].argmax().item())
        if answer[-1] == processor.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([answer[-1:]])], dim=1)
    return processor.tokenizer.decode(answer, skip_special_tokens=True)


def slow_recall(folder, said, asked):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    states = []
    for text in (said, asked):
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            states.append(model(ids, output_hidden_states=True).hidden_states[LAYER][0])
    best = [
        max(torch.cosine_similarity(token, other, dim=0).item() for other in states[0]) for token in states[1][1:-1]
    ]
    return sum(best) / len(best)


def options(models, **others):
    return {**models, "similarity_layer": LAYER, "max_new_tokens": TOKENS, "dtype": "fp32", **others}


def test_reward_is_the_slow_computation(models, images):
    reward = rewards.load("vlm_alignment", options=options(models, images_at_once=2, reference="the image of {}"))
    scores = reward(images, PROMPTS)
    answers = [slow_answer(models["model"], image, QUESTION) for image in images]
    expected = [slow_recall(models["similarity"], *pair) for pair in zip(answers, PROMPTS, strict=True)]
    assert len(set(answers)) == 3 and all(answers)
    of_image = [
        slow_recall(models["similarity"], said, f"the image of {asked}")
        for said, asked in zip(answers, PROMPTS, strict=True)
    ]
    torch.testing.assert_close(scores, torch.tensor(of_image), rtol=1e-4, atol=1e-5)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    plain = rewards.load("vlm_alignment", options=options(models))(images.requires_grad_(), PROMPTS)
    torch.testing.assert_close(plain, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_nothing_is_said_of_an_image_of_nan(models, images):
    reward, broken = rewards.load("vlm_alignment", options=options(models)), images.clone()
    broken[1, 0, 0, 0] = torch.nan
    scores, expected = reward(broken, PROMPTS), reward(images, PROMPTS)
    assert scores[1].isnan() and torch.equal(scores[[0, 2]], expected[[0, 2]])


def test_declares_no_gradient(models):
    reward = rewards.load("vlm_alignment", options=options(models))
    assert not reward.differentiable and reward.downloads
    with pytest.raises(RewardSpecError, match="DRaFT follows"):
        rewards.check_differentiable(reward, "DRaFT")


def test_answers_are_the_same_in_any_batch(describer, images):
    several = describer.describe(pictures(images), "what is this ?", TOKENS, at_once=3)
    assert several == describer.describe(pictures(images), "what is this ?", TOKENS, at_once=1)
    assert several != describer.describe(pictures(images), "a cat or a horse ?", TOKENS)


def test_processor_without_a_chat_template(models, images):
    describer = Describer(models["model"], "fp32")
    describer.processor.chat_template = None
    given = describer.describe(pictures(images), "<image> what is this ? :", TOKENS)
    assert given == [slow_answer(models["model"], image, "what is this ?") for image in images]
    # The image's place, where the question leaves it out.
    assert describer.describe(pictures(images), "what is this ? :", TOKENS) == given


@pytest.mark.parametrize(
    ("tokens", "echoed"),
    [([7, 8, 9, 1, 2], 3), ([7, 8, 1, 2], 2), ([1, 2, 3, 4], 0), ([7, 1], 0), ([7, 8, 9], 3)],
)
def test_an_output_may_begin_with_its_input(tokens, echoed):
    assert _echoed(torch.tensor([tokens, tokens]), torch.tensor([[7, 8, 9]] * 2)) == echoed


def test_half_precision_moves_to_the_model(models, images):
    describer = Describer(models["model"], "bf16")
    assert describer.model.dtype == torch.bfloat16
    assert len(describer.describe(pictures(images), QUESTION, 2)) == 3


class Scripted(BaseHTTPRequestHandler):
    """Gives the server's answers one after another, each a (status, body), and the last one for ever."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, dict(self.headers), json.loads(body) if body else None))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if answer is None:
            threading.Event().wait(1.0)
            return
        status, content = answer
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def scripted(*answers):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.daemon_threads = True
    server.answers, server.seen = list(answers), []
    with running(server) as url:
        yield url, server.seen


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have waited; it does not."""
    waits = []
    monkeypatch.setattr(vlm_client.time, "sleep", waits.append)
    return waits


def chat(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


PICTURE = Image.new("RGB", (5, 4), (10, 200, 30))


def test_served_model_gives_the_scores_of_the_process(models, describer, images):
    own = rewards.load("vlm_alignment", options=options(models))
    with running(VlmServer(describer, "tiny", port=0)) as url:
        settings = options({"similarity": models["similarity"]}, url=url, images_at_once=3)
        served = rewards.load("vlm_alignment", options=settings)
        torch.testing.assert_close(served(images, PROMPTS), own(images, PROMPTS))
        assert served.function.vlm.model == "tiny"


def test_what_is_sent(monkeypatch):
    monkeypatch.setenv("THE_KEY", "secret")
    with scripted((200, chat(" a cat \n"))) as (url, seen):
        server = ChatServer(url, "big", key_variable="THE_KEY")
        assert server.describe([PICTURE], "what ?", 7) == ["a cat"]
    ((path, headers, body),) = seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    (message,) = body.pop("messages")
    assert body == {"model": "big", "temperature": 0, "max_tokens": 7}
    image, question = message["content"]
    assert (message["role"], question) == ("user", {"type": "text", "text": "what ?"})
    encoded = image["image_url"]["url"].removeprefix("data:image/png;base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert sent.format == "PNG" and sent.convert("RGB").tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize("failure", [(500, b"boom"), (503, b""), (429, {"error": "slow down"})])
def test_what_may_pass_is_asked_again(failure, waits):
    with scripted(failure, failure, (200, chat("a cat"))) as (url, seen):
        assert ChatServer(url, "big").describe([PICTURE], "what ?", 7) == ["a cat"]
    assert len(seen) == 3 and waits == [1.0, 2.0]


def test_waits_grow_and_end(waits):
    with scripted((500, b"out of memory\nTraceback")) as (url, seen):
        with pytest.raises(
            RewardSpecError, match=r"completions: status 500 \(out of memory\), asked 8 times; see that"
        ):
            ChatServer(url, "big", retries=7).describe([PICTURE], "what ?", 7)
    assert waits == [1, 2, 4, 8, 16, 30, 30] and len(seen) == 8


def test_silence(waits):
    with scripted(None) as (url, _):
        with pytest.raises(RewardSpecError, match=r"no answer in 0.2 s, asked 2 times; .* raise timeout_s"):
            ChatServer(url, "big", timeout_s=0.2, retries=1).describe([PICTURE], "what ?", 7)
    with pytest.raises(RewardSpecError, match="refused, asked 1 times"):
        ChatServer(url, "big", retries=0).describe([PICTURE], "what ?", 7)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("an answer was unpickled",))


def pickled():
    return pickle.dumps({"choices": Bomb()})


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b"no such model\nmore", r"status 400 \(no such model\)$"),
        (401, b"", r"status 401 \(Unauthorized\)$"),
        (302, b"", r"status 302 \(Found\)$"),
        (200, b"<html>hello", "its answer is not JSON: '<html>hello'"),
        (200, pickled(), "its answer is not JSON"),
        (200, [1, 2], "no JSON object"),
        (200, {"text": "a cat"}, "one choice is expected, and it gave no list of choices"),
        (200, {"choices": []}, "and it gave 0 choices"),
        (200, {"choices": chat("a")["choices"] * 2}, "and it gave 2 choices"),
        (200, {"choices": ["a cat"]}, r"choices\[0\].message.content is no text"),
        (200, chat(None), r"choices\[0\].message.content is no text"),
        (200, b" " * (4 * 2**20 + 1), "longer than 4194304 bytes"),
    ],
)
def test_answers_that_are_none(status, body, message, waits):
    with scripted((status, body)) as (url, seen):
        with pytest.raises(RewardSpecError, match=message):
            ChatServer(url, "big").describe([PICTURE], "what ?", 7)
    assert len(seen) == 1 and not waits


def test_server_that_lists_no_model():
    with scripted((200, {"data": []})) as (url, _):
        with pytest.raises(RewardSpecError, match="/models: it names no model; set model"):
            ChatServer(url).describe([PICTURE], "what ?", 7)


def test_the_key_is_in_no_error(monkeypatch, waits):
    monkeypatch.setenv("THE_KEY", "secret")
    with scripted((401, b"wrong key")) as (url, _):
        with pytest.raises(RewardSpecError) as error:
            ChatServer(url, "big", key_variable="THE_KEY").describe([PICTURE], "what ?", 7)
    assert "secret" not in str(error.value)


def content(image, text="what ?"):
    return [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]


def request(**changes):
    return {"messages": [{"role": "user", "content": content(vlm_client.data_uri(PICTURE))}], **changes}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/chat/completions", request(temperature=0.7), 400, "answers are greedy"),
        ("/chat/completions", request(stream=True), 400, "leave stream and n out"),
        ("/chat/completions", request(max_tokens=0), 400, "from 1 to 1024"),
        ("/chat/completions", request(messages=[]), 400, "one message of the user"),
        ("/chat/completions", request(messages=[{"content": "hello"}]), 400, "a list of one image_url and one text"),
        ("/chat/completions", request(messages=[{"content": content("x")[1:]}]), 400, "and one text, not text"),
        ("/chat/completions", request(messages=[{"content": content("file:///etc/hosts")}]), 400, "are not fetched"),
        ("/chat/completions", request(messages=[{"content": content("data:image/png;base64,aGVs")}]), 400, "not read"),
        ("/chat/completions", request(messages=[{"content": content("data:image/png;base64,*")}]), 400, "not read"),
        ("/chat/completions", [1], 400, "no JSON object"),
        ("/chat/completions", pickled(), 400, "not JSON"),
        ("/completions", request(), 404, "no such path"),
        ("/chat/completions", request(max_tokens=13), 500, "RuntimeError: thirteen"),
    ],
)
def test_requests_that_are_not_served(path, body, status, message, monkeypatch):
    class Parrot:
        def describe(self, images, question, max_new_tokens):
            if max_new_tokens == 13:
                raise RuntimeError("thirteen")
            return [question]

    monkeypatch.setattr("http.server.BaseHTTPRequestHandler.log_message", lambda *_: None)
    with running(VlmServer(Parrot(), "parrot", port=0)) as url:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url + path, data=data, timeout=5)
        assert error.value.code == status
        assert message in json.loads(error.value.read())["error"]["message"]
        assert ChatServer(url).describe([PICTURE], "who ?", 3) == ["who ?"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "localhost:8000"}, "url='localhost:8000' is no address; give one such as http"),
        ({"url": "file:///tmp/v1"}, "is no address"),
        ({"url": "http://me:secret@host/v1"}, "a key goes by key_variable"),
        ({"url": "http://host/v1", "key_variable": "NOT_SET_HERE"}, "the environment has no such variable"),
        ({"url": "http://host/v1", "timeout_s": 0}, "timeout_s=0 must be above 0"),
        ({"reference": "the image"}, "reference='the image' needs exactly one {} for the prompt"),
        ({"max_new_tokens": 0}, "both must be at least 1"),
        ({"dtype": "int8"}, "dtype='int8'; allowed are 'fp32', 'fp16', 'bf16'"),
        ({"model": "no/such/folder"}, "cannot load model='no/such/folder'"),
        ({"colour": 3}, "has no option 'colour'"),
    ],
)
def test_options_that_do_not_fit(models, given, message):
    with pytest.raises(RewardSpecError, match=message):
        rewards.load("vlm_alignment", options=given)


def test_model_that_takes_no_images(models):
    with pytest.raises(RewardSpecError, match="model="):
        VlmAlignment(model=models["similarity"])


def test_one_prompt_for_each_image(models, images):
    reward = rewards.load("vlm_alignment", options=options(models))
    with pytest.raises(RewardSpecError, match="3 images and 2 prompts"):
        reward(images, PROMPTS[:2])


def test_server_command_with_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "none")]) == 2
    assert "vlm_server: error: reward 'vlm_alignment' cannot load model=" in capsys.readouterr().err
