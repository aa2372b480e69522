// Peer: Go's net/http with MongoDB's own driver. It inserts each event by itself, or with
// the argument group-commit all that wait together.
package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http"
	"os"

	"go.mongodb.org/mongo-driver/mongo"
	"go.mongodb.org/mongo-driver/mongo/options"
)

type event = map[string]any

type waiting struct {
	event  event
	result chan error
}

func main() {
	uri := options.Client().ApplyURI(os.Getenv("MONGODB_URI"))
	client, err := mongo.Connect(context.Background(), uri)
	if err != nil {
		log.Fatal(err)
	}
	events := client.Database(os.Getenv("MONGODB_DATABASE")).Collection("events")
	insert := func(one event) error {
		_, err := events.InsertOne(context.Background(), one)
		return err
	}
	if len(os.Args) > 1 && os.Args[1] == "group-commit" {
		queue := make(chan waiting, 1024)
		go commit(events, queue)
		insert = func(one event) error {
			result := make(chan error, 1)
			queue <- waiting{one, result}
			return <-result
		}
	}

	secret := []byte(os.Getenv("SEGMENT_SHARED_SECRET"))
	http.HandleFunc("/webhook", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // the signature shows whether it is whole
		digest := hmac.New(sha1.New, secret)
		digest.Write(body)
		expected := hex.EncodeToString(digest.Sum(nil))
		if !hmac.Equal([]byte(expected), []byte(r.Header.Get("X-Signature"))) {
			answer(w, 401, "error", "X-Signature does not match the body")
			return
		}
		var received event
		if err := json.Unmarshal(body, &received); err != nil {
			answer(w, 400, "error", err.Error())
			return
		}
		received["_id"] = received["messageId"]
		if err := insert(received); err != nil {
			answer(w, 503, "error", err.Error())
			return
		}
		answer(w, 200, "insertedId", received["_id"])
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}

func answer(w http.ResponseWriter, status int, name string, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]any{name: value})
}

// commit inserts what waits with one command, while the next events gather.
func commit(events *mongo.Collection, queue chan waiting) {
	unordered := options.InsertMany().SetOrdered(false)
	for first := range queue {
		batch := []waiting{first}
		for len(queue) > 0 { // nobody else takes from it
			batch = append(batch, <-queue)
		}
		documents := make([]any, len(batch))
		for i := range batch {
			documents[i] = batch[i].event
		}
		_, err := events.InsertMany(context.Background(), documents, unordered)
		results := make([]error, len(batch))
		var bulk mongo.BulkWriteException
		if errors.As(err, &bulk) && bulk.WriteConcernError == nil {
			err = nil // of some documents only: MongoDB has stored the others
			for _, refused := range bulk.WriteErrors {
				results[refused.Index] = refused
			}
		}
		for i := range batch {
			if err != nil {
				results[i] = err
			}
			batch[i].result <- results[i]
		}
	}
}
