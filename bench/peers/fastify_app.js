// Peer: Fastify with MongoDB's own driver, in one process as Node runs it.
const crypto = require("node:crypto");
const fastify = require("fastify");
const { MongoClient } = require("mongodb");

const { MONGODB_DATABASE, MONGODB_URI, PORT, SEGMENT_SHARED_SECRET } = process.env;
const client = new MongoClient(MONGODB_URI);
const collection = client.db(MONGODB_DATABASE).collection("events");
const app = fastify();

function verify(body, signature = "") {
  const digest = crypto.createHmac("sha1", SEGMENT_SHARED_SECRET).update(body).digest("hex");
  const [expected, given] = [Buffer.from(digest), Buffer.from(signature)];
  return expected.length === given.length && crypto.timingSafeEqual(expected, given);
}

// The signature is that of the body's exact bytes, so Fastify must not parse it.
app.addContentTypeParser("application/json", { parseAs: "buffer" }, (_, body, done) =>
  done(null, body),
);

app.post("/webhook", async (request, reply) => {
  if (!verify(request.body, request.headers["x-signature"])) {
    return reply.code(401).send({ error: "X-Signature does not match the body" });
  }
  const event = JSON.parse(request.body);
  event._id = event.messageId;
  await collection.insertOne(event);
  return { insertedId: event._id };
});

client.connect().then(() => app.listen({ host: "127.0.0.1", port: Number(PORT) }));
