"""Use the gateway that `make demo` leaves running: only `base_url` differs from talking to the teacher."""

from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="unused")
answer = client.chat.completions.with_raw_response.create(
    model="stand-in",
    messages=[
        {"role": "system", "content": Path(__file__).with_name("system_prompt.txt").read_text()},
        {"role": "user", "content": "Can I move my delivery to Friday?"},
    ],
)
print(answer.parse().choices[0].message.content)
for name in ("route", "reason", "confidence", "cost-usd"):
    print(f"{name}: {answer.headers.get(f'x-understudy-{name}')}")
