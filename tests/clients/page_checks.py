"""The page at `/` in headless Chromium, through the `playwright` package. Run as: page_checks.py CHECK BASE_URL.

Each function is a check; `tests/clients/main.rs` runs them all against the embedded model. What the page's policy
forbids and what its scripts throw fails the check that sees it. With a folder as a third argument a check leaves
pictures there.
"""

import re
import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

QUESTION = "What is 345 + 278?"
ANSWER = "345 + 278 = 623"
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


def send(page, question):
    page.get_by_label("Message", exact=True).fill(question)
    page.get_by_role("button", name="Send").click()


def answers(page):
    return page.locator("article.assistant > .text")


def over(page):
    """Waits for the answer's end."""
    expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=60_000)


def setting(page, name, value):
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label(name, exact=True).fill(value)
    page.get_by_text("Settings", exact=True).click()


def chat(page, picture):
    send(page, QUESTION)
    over(page)
    expect(answers(page)).to_have_text(ANSWER)
    expect(page.locator("article.assistant .note")).to_contain_text("tokens")
    picture("answer")
    page.get_by_role("button", name="Regenerate").click()
    over(page)
    # In place of the first.
    expect(answers(page)).to_have_text(ANSWER)
    setting(page, "max_tokens", "1")
    page.get_by_role("button", name="Regenerate").click()
    over(page)
    expect(page.locator("article.assistant .note")).to_contain_text("cut off at max_tokens")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)


def stop(page, picture):
    # A temperature at which the model hardly ends by itself, and a click as soon as there is a text: it is fast.
    setting(page, "temperature", "100")
    setting(page, "seed", "7")
    page.evaluate(
        """new MutationObserver((_, it) => {
            if (!document.querySelector("article.assistant .text")?.textContent) return;
            it.disconnect();
            document.getElementById("stop").click();
        }).observe(document.getElementById("log"), { childList: true, subtree: true })"""
    )
    send(page, "What is secondwind?")
    expect(page.locator("article.assistant .note")).to_have_text("stopped")
    over(page)
    picture("stopped")
    left = answers(page).text_content()
    setting(page, "temperature", "0")
    send(page, QUESTION)
    over(page)
    # What was stopped stays as it was, and the server goes on.
    assert answers(page).first.text_content() == left
    expect(answers(page)).to_have_count(2)


def errors(page, picture):
    setting(page, "top_p", "2")
    send(page, QUESTION)
    over(page)
    expect(page.get_by_role("alert")).to_contain_text("top_p")
    picture("error")
    setting(page, "top_p", "")
    page.get_by_role("button", name="Regenerate").click()
    over(page)
    expect(answers(page)).to_have_text(ANSWER)


def text_is_text(page, picture):
    send(page, "<img src=x onerror=document.title='bad'><b>bold</b>")
    over(page)
    expect(page.locator("article.user > .text")).to_have_text(re.compile("^<img src=x .*<b>bold</b>$"))
    assert page.locator("#log img, #log b").count() == 0
    assert page.title() == "secondwind"


def rack(page, picture):
    send(page, QUESTION)
    over(page)
    page.get_by_role("link", name="Rack").click()
    expect(page.get_by_role("status")).to_have_text("serving")
    ranks = page.locator("#ranks > li")
    expect(ranks).to_have_count(2)
    for rank in ranks.all():
        expect(rank).to_contain_text("query heads")
        expect(rank).to_contain_text(re.compile(r"compute \d+\s%, exchange \d+\s%, waiting \d+\s%"))
    expect(page.locator("[data-figure=running]")).to_have_text("0")
    page.get_by_text("Paths chosen").first.click()
    picture("rack")
    page.get_by_role("link", name="Chat").click()
    expect(answers(page)).to_have_text(ANSWER)


def keys(page, picture):
    """A server that wants a key is asked again with the one that was typed."""

    def guard(route):
        if route.request.headers.get("authorization") == "Bearer open sesame":
            return route.continue_()
        error = {"error": {"message": "no key, no answer"}}
        return route.fulfill(status=401, json=error)

    for path in ["**/rack", "**/v1/**"]:
        page.route(path, guard)
    page.reload()
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("no key, no answer")
    picture("key")
    dialog.get_by_label("Key").fill("wrong")
    dialog.get_by_role("button", name="Use it").click()
    dialog.get_by_label("Key").fill("open sesame")
    dialog.get_by_role("button", name="Use it").click()
    expect(dialog).to_be_hidden()
    send(page, QUESTION)
    over(page)
    expect(answers(page)).to_have_text(ANSWER)


def keyboard(page, picture):
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    over(page)
    expect(answers(page)).to_have_text(ANSWER)
    # Everything that can be worked has a name.
    for field in page.locator("button, input, select, textarea, a").all():
        name = field.evaluate("it => it.textContent.trim() || it.labels?.[0]?.textContent.trim()")
        assert name, field.evaluate("it => it.outerHTML")


def run(check, url, pictures):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, size in [("desktop", DESKTOP), ("phone", PHONE)]:
            context = browser.new_context(viewport=size, color_scheme="dark" if name == "phone" else "light")
            page = context.new_page()
            faults = []
            page.on("pageerror", lambda error: faults.append(str(error)))
            # A refused request is a line there, too, and is looked for where it is shown.
            blocked = lambda line: "Content Security Policy" in line.text and faults.append(line.text)
            page.on("console", blocked)

            def picture(what):
                if pictures:
                    page.screenshot(path=Path(pictures) / f"{what}-{name}.png")

            page.goto(url)
            check(page, picture)
            assert not page.evaluate("document.documentElement.scrollWidth > innerWidth"), "it is too wide"
            assert not faults, faults
            context.close()
        browser.close()


if __name__ == "__main__":
    check, base_url, *pictures = sys.argv[1:]
    run(globals()[check], base_url, pictures[0] if pictures else None)
