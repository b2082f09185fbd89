"""An S3 object store by other authors: moto's, on this machine, with the interface of `s3.Bucket`.

Differences from S3: moto checks the condition of a put and then writes, without a lock between. It
serves any credentials. As in S3, and unlike in `s3.Bucket`, the tag is the MD5 of the content.
"""

import threading
from collections import Counter
from collections.abc import MutableMapping
from contextlib import contextmanager
from urllib.parse import unquote

import boto3
from botocore.exceptions import ClientError
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_REGION": "us-east-1",
}


class Objects(MutableMapping):
    """Data, tag and time of each key; tag and time are ignored in assignments."""

    def __init__(self, client):
        self.client = client

    def __getitem__(self, key):
        try:
            response = self.client.get_object(Bucket="bucket", Key=key)
        except ClientError as error:
            raise KeyError(key) from error
        return response["Body"].read(), response["ETag"], response["LastModified"]

    def __setitem__(self, key, content):
        self.client.put_object(Bucket="bucket", Key=key, Body=content[0])

    def __delitem__(self, key):
        if key not in self:
            raise KeyError(key)
        self.client.delete_object(Bucket="bucket", Key=key)

    def __iter__(self):
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
            yield from (item["Key"] for item in page.get("Contents", ()))

    def __len__(self):
        return sum(1 for _ in self)

    def clear(self):
        for key in list(iter(self)):
            self.client.delete_object(Bucket="bucket", Key=key)


class MotoBucket:
    """The bucket, as seen by boto3.

    Attributes:
        objects: data, tag and time of each key.
        puts: how often each key was written.
        environment: variables of processes that use the server.
    """

    def __init__(self, client, puts, environment):
        self.objects, self.puts, self.environment = Objects(client), puts, environment

    def put(self, key, data, match, none_match):
        assert not match and not none_match
        self.objects[key] = (data,)


class QuietHandler(WSGIRequestHandler):
    disable_nagle_algorithm = True

    def log_request(self, *args):
        pass


@contextmanager
def serving_moto():
    """Yields the bucket; the server has no other."""
    puts, application = Counter(), DomainDispatcherApplication(create_backend_app)

    def counted(environ, start_response):
        def start(status, *rest):
            if environ["REQUEST_METHOD"] == "PUT" and status.startswith("200"):
                puts[unquote(environ["PATH_INFO"]).partition("/")[2].partition("/")[2]] += 1
            return start_response(status, *rest)

        return application(environ, start)

    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=QuietHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", **CREDENTIALS}
    client = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_REGION"],
    )
    client.create_bucket(Bucket="bucket")
    try:
        yield MotoBucket(client, puts, environment)
    finally:
        client.close()
        server.shutdown()
        server.server_close()
        thread.join()
