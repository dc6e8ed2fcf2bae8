"""Talk to 'million serve' with the openai client.

    million serve model.gguf --kv pq4
    python examples/openai_client.py "Why is the sky blue?"

Whatever speaks OpenAI's protocol works the same way. LangChain, for example:

    from langchain_openai import ChatOpenAI
    llm = ChatOpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none", model="any")
    print(llm.invoke("Why is the sky blue?").content)
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Ask a server with an OpenAI interface, and print the answer as it comes."
    )
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--key", default="none", help="the server's API key, if it has one")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=args.key)
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.question}],
        max_tokens=128,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
